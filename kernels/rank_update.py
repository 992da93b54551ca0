"""out += rows_i' rows_j over a rectangle, a triangle or a symmetric tile of blocks, by a persistent schedule.

A triangle of N^2/2 entries takes N^2 k flops and reads and writes itself once; every program has work (schedule.py).
All k rows, of one panel or of several laid one below the other, are accumulated in float32 registers before a block is
read, added to and written. Centering and scaling are done at the load of a float32 panel: ((x - high) - low) gain, with
the mean in two float32 parts, so that it costs no accuracy against a float64 mean; a last row, already centered and
scaled (the step of the mean, see `lossk.accumulate.panel`), is added in float32.

Offsets are 64-bit: row times stride passes 2^31 from N = 46,341.
"""

import triton
import triton.language as tl
from torch import Tensor

from lossk.kernels.launch import Config, launch, name_of, pointer, processors
from lossk.kernels.schedule import rectangle_block, triangle_block

GROUP = 8  # block columns that share rows
# Side of a block, depth of a step, warps, stages: for rows that are ready and an aligned out, and for all else.
# Not tuned: the largest that spill nothing; no GPU was at hand.
SHAPES = {
    "fp32": (64, 16, 8, 3),
    "tf32": (128, 32, 8, 3),
    "tf32x3": (64, 32, 4, 3),
    "fp16": (128, 64, 8, 3),
    "bf16": (128, 64, 8, 3),
}
SMALL = (64, 16, 8, 2)
SCHEDULED = ["triangle", "row_blocks", "column_blocks", "total"]
HALF = {"fp16": "float16", "bf16": "bfloat16"}


@triton.jit
def load_rows(ptr, stride, steps, k, offsets, padded, high, low, gain, FUSED: tl.constexpr):
    """Rows `steps` [DEPTH] int64 at columns `offsets` [SIDE] int32; 0 from row k and column `padded` on."""
    mask = (steps < k)[:, None] & (offsets < padded)[None, :]
    x = tl.load(ptr + steps[:, None] * stride + offsets[None, :], mask=mask, other=0.0)
    if FUSED:
        x = tl.where(mask, ((x - high[None, :]) - low[None, :]) * gain[None, :], 0.0)
    return x


@triton.jit
def load_scaling(ptr, stride, offsets, padded, FUSED: tl.constexpr):
    """Mean (high and low part), 1/scale and last row of some columns; zeros, unread, unless FUSED."""
    high = tl.zeros_like(offsets).to(tl.float32)
    low = high
    gain = high
    last = high
    if FUSED:
        inside = offsets < padded
        high = tl.load(ptr + offsets, mask=inside, other=0.0)
        low = tl.load(ptr + stride + offsets, mask=inside, other=0.0)
        gain = tl.load(ptr + 2 * stride + offsets, mask=inside, other=0.0)
        last = tl.load(ptr + 3 * stride + offsets, mask=inside, other=0.0)
    return high, low, gain, last


@triton.jit
def add_half(ptr, stride, sums, rows_left, columns_left, below, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Add `sums` [HEIGHT, WIDTH] at ptr, within the rows and columns left, where row <= column + below.

    What lies under the diagonal is written back as it was: a mask per entry would cost the 16-byte loads and stores,
    and no other program touches that block.
    """
    row = tl.arange(0, HEIGHT)
    column = tl.arange(0, WIDTH)
    sums = tl.where(row[:, None] <= column[None, :] + below, sums, 0.0)
    inside = (row < rows_left)[:, None] & (column < columns_left)[None, :]
    at = ptr + (row.to(tl.int64) * stride)[:, None] + column[None, :]
    new = tl.load(at, mask=inside, other=0.0).to(tl.float32) + sums
    tl.store(at, new.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def add_block(ptr, stride, sums, i, j, a, b, triangle, SIDE: tl.constexpr):
    """Add `sums` to block (i, j), to its entries on and above the matrix's diagonal if `triangle`.

    In two halves, so that the old values and their addresses find room beside the sums in the registers.
    """
    HALF: tl.constexpr = SIDE // 2
    row0 = i.to(tl.int64) * SIDE
    column0 = j.to(tl.int64) * SIDE
    below = tl.where((triangle != 0) & (i == j), 0, SIDE)
    ptr += row0 * stride + column0
    first, second = tl.split(tl.permute(tl.reshape(sums, [SIDE, 2, HALF]), [0, 2, 1]))
    add_half(ptr, stride, first, a - row0, b - column0, below, SIDE, HALF)
    add_half(ptr + HALF, stride, second, a - row0, b - column0 - HALF, below + HALF, SIDE, HALF)


@triton.jit(do_not_specialize=["out_stride", "left_stride", "right_stride", "k", "a", "b", *SCHEDULED])
def rank_update_kernel(
    out_ptr,  # [a: tl.int32, b] float32 or float16, rows out_stride apart, changed
    left_ptr,  # [k, a padded to 16], rows 16 left_stride apart
    right_ptr,  # [k, b padded to 16], rows 16 right_stride apart
    scaling_ptr,  # [4, a padded to 16] float32 if FUSED, where a = b: mean high, mean low, 1/scale, last row
    out_stride: tl.int64,
    left_stride: tl.int64,
    right_stride: tl.int64,
    k: tl.int32,
    a: tl.int32,
    b: tl.int32,
    triangle: tl.int32,  # 0: the whole rectangle; 1: entries row <= column only
    row_blocks: tl.int32,
    column_blocks: tl.int32,
    total: tl.int32,
    FUSED: tl.constexpr,
    PRECISION: tl.constexpr,  # "ieee", "tf32", "tf32x3", "fp16", "bf16"
    ALIGNED: tl.constexpr,  # out_stride and b are multiples of 16, and so are all addresses in bytes
    UPCAST: tl.constexpr,  # the interpreter has no bfloat16 product: multiply as float32, which is exact
    SIDE: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    if ALIGNED:  # both are multiples of 16 already; now the compiler knows
        out_stride = out_stride // 16 * 16
        b = b // 16 * 16
    a_padded = (a + 15) // 16 * 16  # multiples of 16, and known as such: loads are 16 bytes wide
    b_padded = (b + 15) // 16 * 16
    for t in range(tl.program_id(0), total, tl.num_programs(0)):
        if triangle == 0:
            i, j = rectangle_block(t, row_blocks, column_blocks, GROUP)
        else:
            i, j = triangle_block(t, row_blocks, GROUP)
        rows = i * SIDE + tl.arange(0, SIDE)
        columns = j * SIDE + tl.arange(0, SIDE)
        high_i, low_i, gain_i, last_i = load_scaling(scaling_ptr, a_padded, rows, a_padded, FUSED)
        high_j, low_j, gain_j, last_j = load_scaling(scaling_ptr, b_padded, columns, b_padded, FUSED)
        sums = tl.zeros([SIDE, SIDE], tl.float32)
        for first in range(0, k, DEPTH):
            steps = tl.arange(0, DEPTH).to(tl.int64) + first
            x = load_rows(
                left_ptr, left_stride.to(tl.int64) * 16, steps, k, rows, a_padded, high_i, low_i, gain_i, FUSED
            )
            y = load_rows(
                right_ptr, right_stride.to(tl.int64) * 16, steps, k, columns, b_padded, high_j, low_j, gain_j, FUSED
            )
            if PRECISION == "fp16":
                x = x.to(tl.float16)
                y = y.to(tl.float16)
            if PRECISION == "bf16":
                x = x.to(tl.bfloat16)
                y = y.to(tl.bfloat16)
            if UPCAST:
                x = x.to(tl.float32)
                y = y.to(tl.float32)
            if PRECISION == "fp16" or PRECISION == "bf16":
                sums = tl.dot(tl.trans(x), y, sums)
            else:
                sums = tl.dot(tl.trans(x), y, sums, input_precision=PRECISION)
        if FUSED:
            sums += last_i[:, None] * last_j[None, :]
        add_block(out_ptr, out_stride, sums, i, j, a, b, triangle, SIDE)


def configuration(rows: str, precision: str, out: str, fused: bool, aligned: bool) -> Config:
    """What `rank_update` launches for dtypes of rows and out, and a precision of `SHAPES`."""
    side, depth, warps, stages = SHAPES[precision] if aligned else SMALL
    types = [pointer(out), pointer(rows), pointer(rows), "*fp32", *["i64"] * 3, *["i32"] * 7]
    constants = {
        "FUSED": fused,
        "PRECISION": "ieee" if precision == "fp32" else precision,
        "ALIGNED": aligned,
        "UPCAST": False,
        "SIDE": side,
        "DEPTH": depth,
        "GROUP": GROUP,
    }
    how = " centered at the load" if fused else "" if aligned else ", unaligned out"
    label = f"{rows} rows{how}, {precision}, {out} out"
    return Config(rank_update_kernel, label, types, constants, warps, stages)


def configs() -> list[Config]:
    """Every configuration that `rank_update` can launch."""
    return [
        configuration("float32" if fused else HALF.get(precision, "float32"), precision, out, fused, aligned)
        for fused, aligned in ((False, True), (False, False), (True, False))
        for precision in SHAPES
        for out in ("float32", "float16")
    ]


def rank_update(
    out: Tensor,
    left: Tensor,
    right: Tensor,
    *,
    triangle: bool,
    precision: str,
    scaling: Tensor | None,
) -> None:
    """Add to `out` in place; arguments are checked by `lossk.ops.rank_update`.

    Args:
        out: [a, b] float32 or float16, columns adjacent.
        left, right: [k, a] and [k, b]: float16 or bfloat16 for these precisions, else float32. Rows whose
            length or distance is no multiple of 16, or that start off a 16-byte border, are copied first.
        triangle: left is right, a = b, and only entries row <= column are changed.
        precision: of the products: a key of `SHAPES`. Sums are float32.
        scaling: [4, a] float32: center and scale float32 rows at the load; see `rank_update_kernel`.
    """
    a, b = out.shape
    aligned = scaling is None and b % 16 == 0 and out.stride(0) % 16 == 0 and out.data_ptr() % 16 == 0
    left = _padded(left)
    right = left if triangle else _padded(right)
    config = configuration(name_of(left.dtype), precision, name_of(out.dtype), scaling is not None, aligned)
    if triton.knobs.runtime.interpret and precision == "bf16":
        config.constants["UPCAST"] = True
    row_blocks, column_blocks = (triton.cdiv(n, config.constants["SIDE"]) for n in (a, b))
    total = row_blocks * (row_blocks + 1) // 2 if triangle else row_blocks * column_blocks
    assert total < 2**28
    strides = (out.stride(0), left.stride(0) // 16, right.stride(0) // 16)
    schedule = (int(triangle), row_blocks, column_blocks, total)
    scaling = out if scaling is None else _padded(scaling)
    programs = min(total, 2 * processors(out.device))
    launch(config, programs, out, left, right, scaling, *strides, len(left), a, b, *schedule)


def _padded(rows: Tensor) -> Tensor:
    """The rows with 16-byte aligned starts and zeros up to a multiple of 16 columns; themselves if they are so."""
    columns = rows.shape[1]
    if columns % 16 == 0 and rows.stride() == (rows.stride(0) // 16 * 16, 1) and rows.data_ptr() % 16 == 0:
        return rows
    out = rows.new_zeros(len(rows), triton.cdiv(columns, 16) * 16)
    out[:, :columns] = rows
    return out
