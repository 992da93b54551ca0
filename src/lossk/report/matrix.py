"""The correlation matrix, sorted and binned, by streaming over tiles: never N x N."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lossk.forms.blocks import tile_spans
from lossk.kernel.kernel import LossKernel

MOST_BINS = 1600  # a side: 2.6 million cells, twice a laptop screen's matrix at its full height


def binned_correlation(kernel: LossKernel, order: np.ndarray, num_bins: int) -> np.ndarray:
    """Means of R over pairs of bins of consecutive samples: [M, M] float32, symmetric.

    No sample is paired with itself: the mean within a bin is over its pairs i != j. With one sample per bin this is R.

    Args:
        order: [n] int64, distinct row numbers: the samples shown, sorted.
        num_bins: M, at most n. Sample number p in the order is in bin p M // n.

    Memory beyond the kernel's own: M^2 float64, and M by a tile's side twice in float32.
    """
    count = len(order)
    if not 1 <= num_bins <= count:
        raise ValueError(f"num_bins must be from 1 to the {count} samples shown, got {num_bins}")
    # Samples that are not shown go into one bin more, which is dropped.
    place = torch.full((kernel.num_samples,), num_bins, dtype=torch.int64, device="cpu")
    place[torch.from_numpy(order)] = torch.arange(count, device="cpu") * num_bins // count
    total = torch.zeros(num_bins + 1, num_bins + 1, dtype=torch.float64, device="cpu")
    spans = tile_spans(kernel.num_samples, kernel.tile)
    for i, j, tile in kernel.correlation_tiles():
        if i == j:
            tile = tile.clone().fill_diagonal_(0.0)
        part = _sum_by(_sum_by(tile, place[spans[i]], num_bins + 1).T, place[spans[j]], num_bins + 1).T
        total += part
        if i != j:
            total += part.T
    total = (total + total.T) / 2.0  # sums in two orders differ in their last bits
    sizes = torch.bincount(place, minlength=num_bins + 1).double()[:num_bins]
    pairs = sizes.unsqueeze(1) * sizes - torch.diag(sizes)
    mean = torch.where(pairs > 0, total[:num_bins, :num_bins] / pairs.clamp(min=1.0), 1.0)
    return mean.float().numpy()


def _sum_by(values: Tensor, place: Tensor, num_bins: int) -> Tensor:
    """Rows [a, b] added up by their place: [M, b]."""
    return torch.zeros(num_bins, values.shape[1], dtype=torch.float32, device="cpu").index_add_(0, place, values)


def sorted_samples(dead: np.ndarray, *keys: np.ndarray | None) -> np.ndarray:
    """Live samples sorted by the first key, then the next, and so on; keys that are None do not count: [n] int64."""
    alive = np.flatnonzero(~dead)
    given = [key[alive] for key in keys if key is not None]
    return alive[np.lexsort(given[::-1])] if given else alive


def edges_of(groups: np.ndarray) -> tuple[list[int], list[int]]:
    """Where runs of equal numbers in a sorted [n] begin, and their numbers; the end n is appended to the first."""
    if not len(groups):
        return [0], []
    starts = np.concatenate([[0], np.flatnonzero(np.diff(groups)) + 1])
    return [*starts.tolist(), len(groups)], groups[starts].tolist()
