"""Nearest neighbors with their significance: which of them chance alone would have shown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lossk.analysis.inputs import check_kernel
from lossk.kernel.indexing import resolve
from lossk.kernel.neighbor_table import NeighborTable
from lossk.kernel.standard_error import method_for, pair_errors

if TYPE_CHECKING:
    from lossk.kernel.kernel import LossKernel


class NearestAndSure(NamedTuple):
    """The fields of `SignificantNeighbors`."""

    index: Tensor  # type: ignore[assignment]  # [N, k] int64; -1 where a sample has fewer than k
    correlation: Tensor  # [N, k] float32; 0 where the index is -1
    standard_error: Tensor  # [N, k] float32, of the correlation; NaN where the index is -1
    noise_floor: Tensor  # [N] float32: what the best of the unrelated samples would reach
    significant: Tensor  # [N, k] bool: |R| above the row's noise floor
    share: float  # significant ones among the N k; unrelated samples: about 1 / k for k of 3 or more
    by_chance: Tensor  # [N, k] float64: how many unrelated samples a row would show above this |R|; NaN at index -1
    row_false_share: Tensor  # [N, k] float64: of a row's neighbors down to this one, the share expected to be false
    table_false_share: Tensor  # [N, k] float64: of all rows' neighbors as sure as this one, the share expected false
    null: str  # where chance was learnt: "rows" (own traces), "watched" (some samples' traces) or "lag1" (a formula)


class SignificantNeighbors(NeighborTable, NearestAndSure):
    """The k most correlated (or most anti-correlated) other samples of N samples, and how far to trust each.

    A named tuple that prints as a table; `to_dataframe()` has all of it, with the kernel's ids and labels.
    """


def significant_neighbors(
    kernel: LossKernel, k: int = 10, rows: Any = None, anti: bool = False
) -> SignificantNeighbors:
    """The k nearest neighbors of each sample, streamed over tiles, with standard errors and the noise floor.

    The noise floor is where one unrelated sample per row is expected (`kernel.neighbors`), so it says where noise
    begins, not that a neighbor just above it is certain. `by_chance` is that expected number for each neighbor (as
    BLAST's E-value): 1 at the floor, 0.01 where one row in a hundred would show such a neighbor by chance.

    Both come from losses of different chains, which are independent (`lossk.kernel.chance`): no law of the losses and
    no form of their memory is supposed. `null` says what was there for it.

    The shares of false discoveries are Benjamini and Hochberg's (1995), over the N - 1 others of a row and over all
    pairs of the rows asked for: neighbors at or below 0.05 are false in at most 5 of 100, on average. They suppose
    that correlations with one sample depend on one another positively or weakly, as one-sided tests that share a trace
    do; for any dependence at all (Benjamini and Yekutieli 2001) take 0.05 / (1 + 1/2 + ... + 1/m), m pairs.

    `standard_error` is `kernel.standard_error`'s.

    Args:
        rows: the samples whose neighbors are wanted, as `kernel[rows]` takes; None = all.
        anti: the most anti-correlated instead, lowest first. There R below -noise_floor is significant.
    """
    kernel = check_kernel("kernel", kernel)
    found = kernel.neighbors(k, rows, anti=anti)
    here = torch.arange(kernel.num_samples, device="cpu") if rows is None else resolve(rows, kernel.num_samples, "rows")
    exists, index = found.index >= 0, found.index.clamp(min=0)
    size = (-found.correlation if anti else found.correlation).double()
    others = max(int((~kernel.dead).sum()) - 1, 0)
    chance = others * kernel._chance.of(here, anti=anti).share_above(size, index)
    chance = chance.masked_fill(~exists, float("nan"))
    significant = exists & (size > found.noise_floor.unsqueeze(1))
    share = float(significant.double().mean()) if significant.numel() else 0.0
    by_row, in_table = chance.numpy(), (chance * int(exists.any(dim=1).sum())).reshape(1, -1).numpy()
    return SignificantNeighbors(
        found.index,
        found.correlation,
        _standard_error(kernel, here, index, size).masked_fill(~exists, float("nan")),
        found.noise_floor,
        significant,
        share,
        chance,
        torch.from_numpy(_false_shares(by_row)),
        torch.from_numpy(_false_shares(in_table)).reshape(chance.shape),
        kernel._chance.method,
    ).of(None if rows is None else here, kernel.names)


def _standard_error(kernel: LossKernel, rows: Tensor, index: Tensor, size: Tensor) -> Tensor:
    """Of the correlations of rows [r] with their neighbors [r, k]: float32."""
    method = method_for(kernel.contents.blocks, watched=kernel._watched() is not None)
    if method == "interval":
        none = torch.zeros(0, index.shape[1], dtype=torch.float32, device="cpu")
        pairs = zip(rows.tolist(), index, strict=True)
        return torch.cat([none, *(kernel.standard_error([i], to, correlation=True) for i, to in pairs)])
    fitted = kernel._fitted_errors if method == "watched" else None
    return pair_errors(kernel.contents.moments, fitted, rows.unsqueeze(1), index, size, correlation=True).float()


def _false_shares(expected: np.ndarray) -> np.ndarray:
    """[r, m]: of each row's entries up to one, the least share of false ones at which it would be accepted.

    Args:
        expected: [r, m] how many entries of the row chance shows at such a size; NaN last, and stays NaN.
    """
    order = np.argsort(expected, axis=1, kind="stable")
    each = np.take_along_axis(expected, order, axis=1) / np.arange(1, expected.shape[1] + 1)
    least = np.fmin.accumulate(each[:, ::-1], axis=1)[:, ::-1]
    out = np.empty_like(expected)
    np.put_along_axis(out, order, np.where(np.isnan(each), np.nan, np.minimum(least, 1.0)), axis=1)
    return out
