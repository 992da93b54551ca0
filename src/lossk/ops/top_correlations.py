"""Running top-k of each row's correlations over tiles, ties broken by the smaller index."""

from __future__ import annotations

import torch
from torch import Tensor

EMPTY = torch.iinfo(torch.int64).min


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
    columns = torch.arange(first_column, first_column + correlation.shape[1], device=correlation.device)
    packed = (_ordered(correlation).long() << 32) | (0x7FFFFFFF - columns)
    packed = packed.masked_fill(correlation == float("-inf"), EMPTY)
    return torch.cat([keys, packed], dim=1).topk(keys.shape[1], dim=1).values


def unpack(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Column [r, k] int64 (-1 where empty) and correlation [r, k] float32 (0 where empty) of packed keys."""
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
