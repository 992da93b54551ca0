"""Cross entropy of hidden states under a linear head, or under each of several heads, without forming logits.

2 B C d k flops for k heads; reads the hidden states and the heads, writes 8 bytes per row, head and split of the
classes. A program multiplies a block of rows with one block of a head's classes after the other in registers, and
keeps of each row only the sum of exponentials over the other classes (exponent_sum.py) and the target's logit. A
second, small kernel adds the splits up and takes log1p in float64.

Programs that share rows come one after the other, over splits and heads, so a block of hidden states is fetched once
into the L2 cache for all heads. Offsets are 64-bit: k C d passes 2^31 from k = 64 heads of 32k classes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lossk.kernels.exponent_sum import EMPTY, add_block, cross_entropy, power_of_two
from lossk.kernels.launch import Config, launch, name_of, pointer, processors

# Rows, classes, depth of a block, warps, stages, by precision; and where d or a stride is no multiple of 16.
# Not tuned: the largest that spill nothing; no GPU was at hand.
SHAPES = {
    "fp32": (64, 32, 16, 4, 3),
    "tf32": (64, 128, 32, 8, 3),
    "tf32x3": (64, 64, 32, 8, 3),
    "fp16": (128, 128, 64, 8, 3),
    "bf16": (128, 128, 64, 8, 3),
}
UNALIGNED = (64, 64, 16, 8, 2)
COMBINED_ROWS = 128
STRIDES = ["hidden_stride", "head_stride", "head_step", "bias_step"]
SIZES = ["batch", "num_classes", "depth", "num_heads", "num_splits", "split_classes", "has_bias"]


@triton.jit(do_not_specialize=[*STRIDES, *SIZES])
def head_loss_kernel(
    hidden_ptr,  # [B, d], rows hidden_stride apart
    head_ptr,  # [k, C, d], rows head_stride and heads head_step apart
    bias_ptr,  # [k, C], heads bias_step apart; not read unless has_bias: tl.int32
    targets_ptr,  # [B] int64
    sum_ptr,  # [k, splits, B] float32: s of the split's s 2^e
    exponent_ptr,  # [k, splits, B] int32: e
    target_ptr,  # [k, B] float32: the target's logit, written by the split that has it
    hidden_stride: tl.int64,
    head_stride: tl.int64,
    head_step: tl.int64,
    bias_step: tl.int64,
    batch: tl.int32,
    num_classes: tl.int32,
    depth: tl.int32,
    num_heads: tl.int32,
    num_splits: tl.int32,
    split_classes: tl.int32,
    has_bias,
    PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr,  # depth and strides are multiples of 16
    UPCAST: tl.constexpr,  # the interpreter has no bfloat16 product: multiply as float32, which is exact
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    DEPTH: tl.constexpr,
):
    if ALIGNED:
        depth = depth // 16 * 16
        hidden_stride = hidden_stride // 16 * 16
        head_stride = head_stride // 16 * 16
        head_step = head_step // 16 * 16
    program = tl.program_id(0)
    split = program % num_splits
    head = program // num_splits % num_heads
    rows = (program // num_splits // num_heads).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < batch
    target = tl.load(targets_ptr + rows, mask=inside, other=-1)
    head_ptr += head.to(tl.int64) * head_step
    bias_ptr += head.to(tl.int64) * bias_step
    s = tl.zeros([ROWS], tl.float32)
    lost = tl.zeros([ROWS], tl.float32)
    e = tl.full([ROWS], EMPTY, tl.int32)
    chosen = tl.zeros([ROWS], tl.float32)
    end = tl.minimum((split + 1) * split_classes, num_classes)
    bias_end = tl.where(has_bias != 0, end, 0)
    for start in range(split * split_classes, end, CLASSES):
        classes = start + tl.arange(0, CLASSES)
        logits = tl.zeros([ROWS, CLASSES], tl.float32)
        for first in range(0, depth, DEPTH):
            d = first + tl.arange(0, DEPTH)
            x_at = hidden_ptr + rows[:, None] * hidden_stride + d[None, :]
            x = tl.load(x_at, mask=inside[:, None] & (d < depth)[None, :], other=0.0)
            y_at = head_ptr + classes.to(tl.int64)[:, None] * head_stride + d[None, :]
            y = tl.load(y_at, mask=(classes < end)[:, None] & (d < depth)[None, :], other=0.0)
            if UPCAST:
                x = x.to(tl.float32)
                y = y.to(tl.float32)
            logits = tl.dot(x, tl.trans(y), logits, input_precision=PRECISION)
        bias = tl.load(bias_ptr + classes, mask=classes < bias_end, other=0.0)
        logits += bias.to(tl.float32)[None, :]
        is_target = classes[None, :] == target[:, None]
        chosen += tl.sum(tl.where(is_target, logits, 0.0), axis=1)
        others = (classes < end)[None, :] & (classes[None, :] != target[:, None])
        s, lost, e = add_block(s, lost, e, tl.where(others, logits, float("-inf")))
    at = (head * num_splits + split).to(tl.int64) * batch + rows
    tl.store(sum_ptr + at, s + lost, mask=inside)
    tl.store(exponent_ptr + at, e, mask=inside)
    mine = inside & (target >= split * split_classes) & (target < end)
    tl.store(target_ptr + head.to(tl.int64) * batch + rows, chosen, mask=mine)


@triton.jit(do_not_specialize=["batch", "num_splits", "row_blocks", "out_step", "out_stride", "ignore_index"])
def combine_kernel(
    sum_ptr,  # [k, splits, B] float32
    exponent_ptr,  # [k, splits, B] int32
    target_ptr,  # [k, B] float32: NaN where a target is no class
    targets_ptr,  # [B] int64
    out_ptr,  # [k, B] float32, heads out_step and rows out_stride apart
    batch: tl.int32,
    num_splits: tl.int32,
    row_blocks: tl.int32,
    out_step: tl.int64,
    out_stride: tl.int64,
    ignore_index: tl.int64,
    ROWS: tl.constexpr,
):
    head = (tl.program_id(0) // row_blocks).to(tl.int64)
    rows = (tl.program_id(0) % row_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < batch
    total = tl.zeros([ROWS], tl.float32)
    e = tl.full([ROWS], EMPTY, tl.int32)
    for split in range(num_splits):
        at = (head * num_splits + split) * batch + rows
        s = tl.load(sum_ptr + at, mask=inside, other=0.0)
        e_split = tl.load(exponent_ptr + at, mask=inside, other=EMPTY)
        new = tl.maximum(e, e_split)
        total = total * power_of_two(e - new) + s * power_of_two(e_split - new)
        e = new
    chosen = tl.load(target_ptr + head * batch + rows, mask=inside, other=0.0)
    ignored = tl.load(targets_ptr + rows, mask=inside, other=0) == ignore_index
    loss = tl.where(ignored, 0.0, cross_entropy(total, e, chosen))
    tl.store(out_ptr + head * out_step + rows * out_stride, loss, mask=inside)


def configuration(dtype: str, precision: str, aligned: bool) -> Config:
    """What `head_loss` launches first, for a dtype of hidden states and heads."""
    rows, classes, depth, warps, stages = SHAPES[precision] if aligned else UNALIGNED
    constants = {
        "PRECISION": precision if precision in ("tf32", "tf32x3") else "ieee",
        "ALIGNED": aligned,
        "UPCAST": False,
        "ROWS": rows,
        "CLASSES": classes,
        "DEPTH": depth,
    }
    types = [*[pointer(dtype)] * 3, "*i64", "*fp32", "*i32", "*fp32", *["i64"] * 4, *["i32"] * 7]
    label = f"{dtype}, {precision}{'' if aligned else ', unaligned'}"
    return Config(head_loss_kernel, label, types, constants, warps, stages)


def combination() -> Config:
    """What `head_loss` launches second."""
    types = ["*fp32", "*i32", "*fp32", "*i64", "*fp32", *["i32"] * 3, *["i64"] * 3]
    return Config(combine_kernel, "splits added up", types, {"ROWS": COMBINED_ROWS})


def configs() -> list[Config]:
    """Every configuration that `head_loss` can launch."""
    dtypes = {"fp16": "float16", "bf16": "bfloat16"}
    mains = [configuration(dtypes.get(p, "float32"), p, aligned) for p in SHAPES for aligned in (True, False)]
    return [*mains, combination()]


def head_loss(
    hidden: Tensor, head: Tensor, bias: Tensor | None, targets: Tensor, out: Tensor, precision: str, ignore_index: int
) -> None:
    """out[h, b] = cross entropy of hidden[b] @ head[h]' + bias[h]; arguments are checked by `lossk.ops.head_loss`.

    Args:
        hidden: [B, d], head: [k, C, d], bias: [k, C] of one dtype, columns adjacent.
        targets: [B] int64. `ignore_index` gives loss 0, any other value outside [0, C) gives NaN.
        out: [k, B] float32, any strides.
        precision: of the products: "fp32", "tf32" or "tf32x3" for float32, else "fp16" or "bf16". Sums are float32.
    """
    (batch, depth), (num_heads, num_classes, _) = hidden.shape, head.shape
    if head.data_ptr() % 16 and depth % 16 == 0:
        # A view of a flat buffer may begin anywhere. A copy is little beside the products, and they are then wide ones.
        head = head.clone(memory_format=torch.contiguous_format)
    strides = (hidden.stride(0), head.stride(1), head.stride(0))
    aligned = not any(n % 16 for n in (depth, *strides, hidden.data_ptr(), head.data_ptr()))
    config = configuration(name_of(hidden.dtype), precision, aligned)
    if triton.knobs.runtime.interpret and precision == "bf16":
        config.constants["UPCAST"] = True
    row_blocks = triton.cdiv(batch, config.constants["ROWS"])
    blocks = triton.cdiv(num_classes, config.constants["CLASSES"])
    # Few rows: the classes are split, so that every processor has work.
    splits = min(blocks, triton.cdiv(2 * processors(hidden.device), row_blocks * num_heads))
    split_classes = triton.cdiv(blocks, splits) * config.constants["CLASSES"]
    splits = triton.cdiv(num_classes, split_classes)

    sums = torch.empty(num_heads, splits, batch, device=hidden.device, dtype=torch.float32)
    exponents = torch.empty(num_heads, splits, batch, dtype=torch.int32, device=hidden.device)
    chosen = torch.full((num_heads, batch), float("nan"), device=hidden.device, dtype=torch.float32)
    bias_step = 0 if bias is None else bias.stride(0)
    tensors = (hidden, head, hidden if bias is None else bias, targets, sums, exponents, chosen)
    sizes = (batch, num_classes, depth, num_heads, splits, split_classes, int(bias is not None))
    launch(config, row_blocks * num_heads * splits, *tensors, *strides, bias_step, *sizes)

    row_blocks = triton.cdiv(batch, COMBINED_ROWS)
    steps = (row_blocks, *out.stride(), ignore_index)
    launch(combination(), num_heads * row_blocks, sums, exponents, chosen, targets, out, batch, splits, *steps)
