"""The running top-k correlations of a tile's rows, merged with those of earlier tiles; no correlation is written.

Reads the tile once (2 or 4 bytes per entry) and k keys of 8 bytes per row, twice. A key packs a correlation and its
column (`lossk.ops.top_correlations`), so ties go to the smaller index, and the result is the reference's bit for bit:
the correlation is (entry * row gain) * column gain, each product rounded to float32, as there. While a key of a block
of columns beats the least of a row's k, it replaces it: k ln(N / k) times per row if columns come in any order, so
most blocks cost a comparison. The k are put in order once, at the end, each by counting those before it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lossk.kernels.launch import Config, launch, name_of, pointer

MOST = 64  # neighbors
COLUMNS = 128
SHAPES = ((16, 8), (64, 2))  # (keys kept, rows of a program). Not tuned: no GPU was at hand.
EMPTY = tl.constexpr(torch.iinfo(torch.int64).min)
NEVER_LEAST = tl.constexpr(torch.iinfo(torch.int64).max)


@triton.jit
def packed(x, column):
    """Keys of correlations x [R, C] float32 in columns `column` [C] int64: in order of x, then of smaller column."""
    x = tl.where(x == 0.0, 0.0, x)  # -0 and 0 are equal
    bits = x.to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (order.to(tl.int64) << 32) | (0x7FFFFFFF - column)[None, :]


@triton.jit(
    do_not_specialize=["row_stride", "column_stride", "num_rows", "num_columns", "first_row", "first_column", "k"]
)
def top_correlations_kernel(
    keys_ptr,  # [r, k] int64, adjacent, best first; changed
    tile_ptr,  # [r, c] float32 or float16, any strides: a tile, or one transposed
    row_gain_ptr,  # [r] float32: 1 / standard deviation in the tile's units, 0 for a dead sample
    column_gain_ptr,  # [c] float32
    row_stride: tl.int64,
    column_stride: tl.int64,
    num_rows: tl.int32,
    num_columns: tl.int32,
    first_row: tl.int64,
    first_column: tl.int64,
    k: tl.int32,
    KEPT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    places = tl.arange(0, KEPT)
    keys_at = keys_ptr + rows[:, None] * k
    held = (rows < num_rows)[:, None] & (places < k)[None, :]
    best = tl.load(keys_at + places[None, :], mask=held, other=EMPTY)
    best = tl.where((places < k)[None, :], best, NEVER_LEAST)
    row_gain = tl.load(row_gain_ptr + rows, mask=rows < num_rows, other=0.0)
    for start in range(0, num_columns, COLUMNS):
        columns = tl.arange(0, COLUMNS).to(tl.int64) + start
        inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
        at = tile_ptr + rows[:, None] * row_stride + columns[None, :] * column_stride
        x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        column_gain = tl.load(column_gain_ptr + columns, mask=columns < num_columns, other=0.0)
        x = (x * row_gain[:, None]) * column_gain[None, :]
        x = tl.where(x > 1.0, 1.0, tl.where(x < -1.0, -1.0, x))
        pair = (row_gain != 0.0)[:, None] & (column_gain != 0.0)[None, :]
        pair = pair & (rows[:, None] + first_row != columns[None, :] + first_column)
        keys = tl.where(pair, packed(x, columns + first_column), EMPTY)
        most = tl.max(keys, axis=1)
        least = tl.min(best, axis=1)
        while tl.max((most > least).to(tl.int32), axis=0) > 0:
            replaced = (places[None, :] == tl.argmin(best, axis=1)[:, None]) & (most > least)[:, None]
            best = tl.where(replaced, most[:, None], best)
            keys = tl.where(keys == most[:, None], EMPTY, keys)
            most = tl.max(keys, axis=1)
            least = tl.min(best, axis=1)
    one = best[:, :, None]
    other = best[:, None, :]
    before = (other > one) | ((other == one) & (places[None, None, :] < places[None, :, None]))
    rank = tl.sum(before.to(tl.int32), axis=2) - (KEPT - k)
    tl.store(keys_at + rank, best, mask=held)


def configuration(dtype: str, k: int) -> Config:
    """What `top_correlations` launches for a tile's dtype and k <= MOST neighbors."""
    kept, rows = next(shape for shape in SHAPES if k <= shape[0])
    types = ["*i64", pointer(dtype), "*fp32", "*fp32", *["i64"] * 2, *["i32"] * 2, *["i64"] * 2, "i32"]
    constants = {"KEPT": kept, "ROWS": rows, "COLUMNS": COLUMNS}
    return Config(top_correlations_kernel, f"{dtype} tiles, up to {kept} neighbors", types, constants)


def configs() -> list[Config]:
    """Every configuration that `top_correlations` can launch."""
    return [configuration(dtype, kept) for dtype in ("float32", "float16") for kept, _ in SHAPES]


def top_correlations(
    keys: Tensor, tile: Tensor, row_gain: Tensor, column_gain: Tensor, first_row: int, first_column: int
) -> None:
    """Merge a tile into keys [r, k] int64, in place; arguments are checked by `lossk.ops.top_correlations`."""
    k = keys.shape[1]
    config = configuration(name_of(tile.dtype), k)
    sizes = (*tile.stride(), *tile.shape, first_row, first_column, k)
    programs = triton.cdiv(len(keys), config.constants["ROWS"])
    launch(config, programs, keys, tile, row_gain, column_gain, *sizes)
