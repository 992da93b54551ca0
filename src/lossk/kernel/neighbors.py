"""Nearest neighbors in the correlation kernel, with the level that chance alone reaches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lossk.forms.blocks import Blocks, Moments, tile_spans, upper_triangle
from lossk.forms.watched import Watched
from lossk.kernel.chance import Chance
from lossk.kernel.neighbor_table import NeighborTable
from lossk.ops import triton_kernels
from lossk.ops.top_correlations import EMPTY, MOST_BY_TRITON, merge_tile, top_correlations, unpack


class Nearest(NamedTuple):
    """The fields of `Neighbors`."""

    index: Tensor  # type: ignore[assignment]  # [N, k] int64; -1 where a sample has fewer than k (dead samples neither have nor are neighbors)
    correlation: Tensor  # [N, k] float32; 0 where the index is -1
    noise_floor: Tensor  # [N] float32; what the best of N - 1 unrelated samples would reach


class Neighbors(NeighborTable, Nearest):
    """The k most correlated other samples of each sample, best first: (index, correlation, noise_floor).

    It prints as a table; `to_dataframe()` has all of it, with the kernel's ids and labels.
    """


BAND = 512  # rows of a block ranked at a time: a rank's keys take 8 bytes an entry, and copies of them
GROUP = 4096  # rows whose neighbors are found in one pass over the columns


def nearest(
    correlation_tile: Callable[[int, int], Tensor], dead: Tensor, tile: int, k: int, *, anti: bool = False
) -> Neighbors:
    """Top-k by streaming over the upper triangle; each tile serves its rows and, transposed, its columns.

    Args:
        correlation_tile: (i, j) -> [a, b] float32, for i <= j; the tensor is changed.
        dead: [N] bool.
        anti: the lowest correlations instead of the highest.
    """
    num_samples = len(dead)
    spans = tile_spans(num_samples, tile)
    keys = torch.full((num_samples, k), EMPTY, dtype=torch.int64, device="cpu")
    for i, j in upper_triangle(len(spans)):
        rows, columns = spans[i], spans[j]
        block = correlation_tile(i, j)
        if anti:
            block.neg_()
        block[dead[rows]] = float("-inf")
        block[:, dead[columns]] = float("-inf")
        if i == j:
            block.fill_diagonal_(float("-inf"))
        _merge(keys[rows], block, columns.start)
        if i != j:
            _merge(keys[columns], block.T, rows.start)
    return _found(keys, anti)


def nearest_on_device(
    read_tile: Callable[[int, int, torch.device], Tensor], gain: Tensor, tile: int, k: int, device: torch.device
) -> Neighbors:
    """`nearest` by the Triton kernel, on a device: correlations are never written.

    They are the same within a rounding: of a transposed tile the gains are multiplied in the other order.

    Args:
        read_tile: (i, j, device) -> [a, b] scaled covariances on the device, for i <= j.
        gain: [N] float32, 1 / standard deviation in the tiles' units, 0 for a dead sample.
        k: at most 64.

    Raises:
        BackendError: the kernel cannot run on the device.
    """
    spans, gain = tile_spans(len(gain), tile), gain.to(device)
    keys = torch.full((len(gain), k), EMPTY, dtype=torch.int64, device=device)
    for i, j in upper_triangle(len(spans)):
        block = read_tile(i, j, device)
        for rows, columns, part in ((spans[i], spans[j], block), (spans[j], spans[i], block.T))[: 1 if i == j else 2]:
            merge_tile(
                keys[rows],
                part,
                gain[rows],
                gain[columns],
                first_row=rows.start,
                first_column=columns.start,
                backend="triton",
            )
    index, correlation = unpack(keys.cpu())
    return Neighbors(index, correlation, torch.zeros(len(gain), dtype=torch.float32, device="cpu"))


def device_for_neighbors(blocks: Blocks, k: int, backend: str | None) -> torch.device | None:
    """Where the Triton kernel is to rank, or None for the host's torch.

    "triton" takes the blocks' own device, or the CUDA device that is there; None takes the kernel only where the blocks
    lie on a CUDA device on which it passes its self-test.

    Raises:
        ValueError: "triton" with more neighbors than it keeps in registers.
        BackendError: "triton", and it cannot run here.
    """
    if backend == "torch" or (backend is None and (blocks.device.type != "cuda" or k > MOST_BY_TRITON)):
        return None
    if k > MOST_BY_TRITON:
        raise ValueError(f"k must be at most {MOST_BY_TRITON} with backend='triton', got {k}")
    device = blocks.device
    if device.type != "cuda" and torch.cuda.is_available():
        device = torch.device("cuda")
    if backend == "triton":
        triton_kernels.load("top_correlations", device)
        return device
    return device if triton_kernels.status("top_correlations", device).available else None


def nearest_of_rows(
    correlation_rows: Callable[[Tensor], Iterator[tuple[slice, Tensor]]],
    dead: Tensor,
    rows: Tensor,
    k: int,
    *,
    anti: bool = False,
) -> Neighbors:
    """Top-k of some rows among all columns, a group of rows and a span of columns at a time.

    Args:
        correlation_rows: rows [r] -> (columns, [r, columns] float32) for all columns in order; the tensors are changed.
        dead: [N] bool.
        rows: [r] int64.
        anti: the lowest correlations instead of the highest.
    """
    keys = torch.full((len(rows), k), EMPTY, dtype=torch.int64, device="cpu")
    for start in range(0, len(rows), GROUP):
        group = slice(start, start + GROUP)
        for columns, block in correlation_rows(rows[group]):
            if anti:
                block.neg_()
            block[dead[rows[group]]] = float("-inf")
            block[:, dead[columns]] = float("-inf")
            within = rows[group] - columns.start
            own = ((within >= 0) & (within < block.shape[1])).nonzero().squeeze(1)
            block[own, within[own]] = float("-inf")
            _merge(keys[group], block, columns.start)
    return _found(keys, anti)


def _found(keys: Tensor, anti: bool) -> Neighbors:
    index, correlation = unpack(keys)
    if anti:
        correlation = 0.0 - correlation  # not -0 where there is none
    return Neighbors(index, correlation, torch.zeros(len(keys), dtype=torch.float32, device="cpu"))


def _merge(keys: Tensor, block: Tensor, first_column: int) -> None:
    """Merge a block into its rows' running top-k [r, k], in place.

    After the first blocks few rows still change: those whose best entry here stays below their k-th are left alone,
    which spares ranking them and changes nothing (an equal entry of a smaller index still counts).
    """
    last = keys[:, -1:]
    least = unpack(last)[1].masked_fill(last == EMPTY, float("-inf")).squeeze(1)
    best = block.amax(dim=1)
    rows = ((best >= least) & (best > float("-inf"))).nonzero().squeeze(1)
    for part in rows.split(BAND):
        if len(part):
            keys[part] = top_correlations(keys[part], block[part], first_column)


def median_noise_floor(moments: Moments, watched: Watched) -> float | None:
    """The noise floor of the median sample that varies at all."""
    alive = (moments.variance > 0).nonzero().squeeze(1)
    return float(Chance(None, moments, lambda: watched).of(alive).floor().median()) if len(alive) else None
