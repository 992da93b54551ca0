"""Per-sample cross entropy from logits, in one read of them, exact to about 1e-6 relative down to 1e-38.

B C logits are read once and B losses written: 2 or 4 bytes and about 12 flops per logit, so memory-bound. A program
takes a few rows and walks over their columns; the sum over the other classes is `exponent_sum`'s, the target's logit is
kept as its column passes, and log1p is taken once per row in float64.
"""

import triton
import triton.language as tl
from torch import Tensor

from lossk.kernels.exponent_sum import EMPTY, add_block, cross_entropy
from lossk.kernels.launch import Config, launch, name_of, pointer

MOST_CLASSES = 2**31 - 4096  # columns are counted in 32 bits

WIDE = 2048  # columns of a block from which on it pays to know that rows are aligned

# Columns up to `most_classes`: rows and columns of a program's block, and its warps. Not tuned: no GPU was at hand.
SHAPES = (  # (most_classes, rows, columns, warps)
    (16, 64, 16, 4),
    (128, 8, 128, 4),
    (2048, 2, 2048, 8),
    (MOST_CLASSES, 1, 4096, 8),
)


@triton.jit(do_not_specialize=["num_rows", "num_classes", "row_stride", "out_stride", "ignore_index"])
def sample_loss_kernel(
    logits_ptr,  # [B, C] float16, bfloat16 or float32; rows row_stride apart
    targets_ptr,  # [B] int64
    out_ptr,  # [B] float32, out_stride apart
    num_rows: tl.int64,
    num_classes: tl.int32,
    row_stride: tl.int64,
    out_stride: tl.int64,
    ignore_index: tl.int64,
    ALIGNED: tl.constexpr,  # num_classes and row_stride are multiples of 8: loads are 16 bytes wide
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    if ALIGNED:
        num_classes = num_classes // 8 * 8
        row_stride = row_stride // 8 * 8
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < num_rows
    target = tl.load(targets_ptr + rows, mask=inside, other=0)
    first = logits_ptr + rows[:, None] * row_stride
    s = tl.zeros([ROWS], tl.float32)
    lost = tl.zeros([ROWS], tl.float32)
    e = tl.full([ROWS], EMPTY, tl.int32)
    chosen = tl.zeros([ROWS], tl.float32)
    for start in range(0, num_classes, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        mask = inside[:, None] & (columns < num_classes)[None, :]
        x = tl.load(first + columns[None, :], mask=mask, other=float("-inf")).to(tl.float32)
        is_target = columns[None, :] == target[:, None]
        chosen += tl.sum(tl.where(is_target & mask, x, 0.0), axis=1)
        s, lost, e = add_block(s, lost, e, tl.where(is_target, float("-inf"), x))
    loss = cross_entropy(s + lost, e, chosen)
    loss = tl.where((target >= 0) & (target < num_classes), loss, float("nan"))
    loss = tl.where(target == ignore_index, 0.0, loss)
    tl.store(out_ptr + rows * out_stride, loss, mask=inside)


def configuration(dtype: str, num_classes: int, aligned: bool) -> Config:
    """What `sample_loss` launches for logits of a dtype and a number of classes."""
    _, rows, columns, warps = next(shape for shape in SHAPES if num_classes <= shape[0])
    aligned = aligned and columns >= WIDE
    return Config(
        sample_loss_kernel,
        f"{dtype} logits, {rows} x {columns}{'' if aligned or columns < WIDE else ', unaligned'}",
        [pointer(dtype), "*i64", "*fp32", "i64", "i32", "i64", "i64", "i64"],
        {"ALIGNED": aligned, "ROWS": rows, "COLUMNS": columns},
        num_warps=warps,
    )


def configs() -> list[Config]:
    """Every configuration that `sample_loss` can launch."""
    return [
        configuration(dtype, shape[0], aligned)
        for dtype in ("float16", "bfloat16", "float32")
        for shape in SHAPES
        for aligned in ((True, False) if shape[2] >= WIDE else (False,))
    ]


def sample_loss(logits: Tensor, targets: Tensor, out: Tensor, ignore_index: int) -> None:
    """out[b] = cross entropy of logits[b]; arguments are checked by `lossk.ops.sample_loss`.

    Args:
        logits: [B, C] float16, bfloat16 or float32, columns adjacent.
        targets: [B] int64, adjacent. `ignore_index` gives loss 0, any other value outside [0, C) gives NaN.
        out: [B] float32, any stride.
    """
    batch, num_classes = logits.shape
    aligned = not (num_classes % 8 or logits.stride(0) % 8 or logits.data_ptr() % 16)
    config = configuration(name_of(logits.dtype), num_classes, aligned)
    programs = triton.cdiv(batch, config.constants["ROWS"])
    arguments = (batch, num_classes, logits.stride(0), out.stride(0), ignore_index)
    launch(config, programs, logits, targets, out, *arguments)
