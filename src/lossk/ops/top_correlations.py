"""Running top-k of each row's correlations over tiles, ties broken by the smaller index."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from lossk.checks import check_integer
from lossk.operands import check_operands, check_word
from lossk.ops import triton_kernels
from lossk.ops.self_test_numbers import waves

EMPTY = torch.iinfo(torch.int64).min
BACKENDS = ("torch", "triton")
MOST_BY_TRITON = 64  # neighbors: its kernel keeps them in registers


def top_correlations(keys: Tensor, correlation: Tensor, first_column: int) -> Tensor:
    """Merge a block of correlations into the running top-k of its rows.

    A correlation and its column are packed into one integer, ordered by correlation and then by smaller column, so a
    plain top-k breaks ties exactly. The column must be below 2^31.

    Args:
        keys: [r, k] int64, the running result; `EMPTY` where there is none yet.
        correlation: [r, c] float32; -inf excludes a pair.
        first_column: the column index of the block's first column.

    Returns:
        [r, k] int64, the new running result, best first; `unpack` reads it.
    """
    check_operands(keys=keys, correlation=correlation)
    first_column = check_integer("first_column", first_column, 0)
    if correlation.ndim != 2 or correlation.dtype != torch.float32:
        raise ValueError(f"correlation must be [r, c] float32, got {list(correlation.shape)} {correlation.dtype}")
    _check_keys(keys, len(correlation), "correlation")
    columns = torch.arange(first_column, first_column + correlation.shape[1], device=correlation.device)
    packed = (_ordered(correlation).long() << 32) | (0x7FFFFFFF - columns)
    packed = packed.masked_fill(correlation == float("-inf"), EMPTY)
    return torch.cat([keys, packed], dim=1).topk(keys.shape[1], dim=1).values


def merge_tile(
    keys: Tensor,
    tile: Tensor,
    row_gain: Tensor,
    column_gain: Tensor,
    *,
    first_row: int,
    first_column: int,
    backend: str,
) -> None:
    """Merge a tile of covariances into the running top-k of its rows, in place; pairs (i, i) are left out.

    The correlation of an entry is (entry * row gain) * column gain, each product rounded to float32, then cut to
    [-1, 1]. A transposed tile serves its columns.

    Args:
        keys: [r, k] int64, adjacent, changed: the running result, best first; `EMPTY` where there is none yet.
        tile: [r, c] float32 or float16.
        row_gain, column_gain: [r] and [c] float32: 1 / standard deviation in the tile's units; 0 for a dead sample,
            which neither has nor is a neighbor.
        first_row, first_column: the samples that the tile's first row and column are; columns below 2^31.
        backend: "torch" (the reference) or "triton" (k <= 64); bit for bit the same.

    Raises:
        ValueError: a bad argument; nothing has been changed.
        BackendError: "triton" cannot run here.
    """
    _check(keys, tile, row_gain, column_gain, backend)
    first_row = check_integer("first_row", first_row, 0)
    first_column = check_integer("first_column", first_column, 0)
    if backend == "torch":
        keys.copy_(merge_tile_reference(keys, tile, row_gain, column_gain, first_row, first_column))
        return
    module = triton_kernels.load("top_correlations", keys.device)
    if keys.numel() and tile.numel():
        module.top_correlations(keys, tile, row_gain.contiguous(), column_gain.contiguous(), first_row, first_column)


def merge_tile_reference(
    keys: Tensor, tile: Tensor, row_gain: Tensor, column_gain: Tensor, first_row: int, first_column: int
) -> Tensor:
    """The same in plain torch: the new keys [r, k]."""
    correlation = (tile.float() * row_gain.unsqueeze(1) * column_gain).clamp_(-1.0, 1.0)
    rows = torch.arange(first_row, first_row + len(tile), device=tile.device)
    columns = torch.arange(first_column, first_column + tile.shape[1], device=tile.device)
    excluded = (rows.unsqueeze(1) == columns) | (row_gain == 0).unsqueeze(1) | (column_gain == 0)
    return top_correlations(keys, correlation.masked_fill(excluded, float("-inf")), first_column)


def unpack(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Column [r, k] int64 (-1 where empty) and correlation [r, k] float32 (0 where empty) of packed keys."""
    check_operands(keys=keys)
    _check_keys(keys, None, "nothing")
    empty = keys == EMPTY
    columns = 0x7FFFFFFF - (keys & 0xFFFFFFFF)
    correlation = _unordered((keys >> 32).int())
    return columns.masked_fill(empty, -1), correlation.masked_fill(empty, 0.0)


def _ordered(values: Tensor) -> Tensor:
    """The bits of float32 values as int32 in the same order; -0 and 0 become equal first."""
    bits = (values.float() + 0.0).view(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _unordered(order: Tensor) -> Tensor:
    return torch.where(order < 0, order ^ 0x7FFFFFFF, order).view(torch.float32)


def _check_keys(keys: Tensor, num_rows: int | None, beside: str) -> None:
    if keys.ndim != 2 or (num_rows is not None and len(keys) != num_rows) or keys.dtype != torch.int64:
        rows = "r" if num_rows is None else num_rows
        raise ValueError(
            f"keys must be [{rows}, k] int64, contiguous, got {list(keys.shape)} {keys.dtype}, beside {beside}"
        )


def _check(keys: Tensor, tile: Tensor, row_gain: Tensor, column_gain: Tensor, backend: str) -> None:
    check_word("backend", backend, BACKENDS)
    check_operands(keys=keys, tile=tile, row_gain=row_gain, column_gain=column_gain)
    if tile.ndim != 2 or tile.dtype not in (torch.float32, torch.float16):
        raise ValueError(f"tile must be [r, c] float32 or float16, got {list(tile.shape)} {tile.dtype}")
    _check_keys(keys, len(tile), "tile")
    if not keys.is_contiguous():
        raise ValueError(f"keys must be [{len(tile)}, k] int64, contiguous, got strides {list(keys.stride())}")
    if backend == "triton" and keys.shape[1] > MOST_BY_TRITON:
        raise ValueError(f"k must be at most {MOST_BY_TRITON} for backend='triton', got {keys.shape[1]}")
    for name, gain, count in (("row_gain", row_gain, len(tile)), ("column_gain", column_gain, tile.shape[1])):
        if gain.shape != (count,) or gain.dtype != torch.float32 or gain.device != tile.device:
            raise ValueError(
                f"{name} must be [{count}] float32 on {tile.device}, "
                f"got {list(gain.shape)} {gain.dtype} on {gain.device}, beside a tile {list(tile.shape)}"
            )


def self_test(module: ModuleType, device: torch.device) -> str:
    """The Triton kernel on two tiles with dead samples and ties, one transposed; returns what differs in any bit."""
    first, second = waves(11, 131), waves(131, 11).mul(8).round().div(8)
    row_gain, column_gain = 1.0 + waves(11).abs(), 1.0 + waves(131).abs()
    row_gain[3], column_gain[77] = 0.0, 0.0
    for k in (5, 33):
        expected = torch.full((11, k), EMPTY, dtype=torch.int64, device="cpu")
        got = expected.clone().to(device)
        on_device = row_gain.to(device), column_gain.to(device)
        for tile, first_column in ((first, 0), (second.T, 131)):
            expected = merge_tile_reference(expected, tile, row_gain, column_gain, 0, first_column)
            module.top_correlations(got, tile.to(device), *on_device, 0, first_column)
        if not torch.equal(got.cpu(), expected):
            return f"the {k} nearest of two tiles differ from the reference"
    return ""
