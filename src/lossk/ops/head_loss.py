"""Per-sample cross entropy of hidden states under a linear head, without keeping logits.

    loss_b = cross entropy of hidden_b @ head' + bias at target_b,

exact to the products' precision for losses down to 1e-38 (see `sample_loss`). With several heads (the draws of a head
over a frozen network) the hidden states are read once for all of them. A fused loss of this kind is known from language
models: E. Wijmans et al., "Cut your losses in large-vocabulary language models", ICLR 2025 (arXiv:2411.09009).
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from lossk.operands import check_ignored, check_operands, check_word
from lossk.ops import triton_kernels
from lossk.ops.rank_update import HALF
from lossk.ops.sample_loss import DTYPES, IGNORED, check_targets_and_out, sample_loss
from lossk.ops.self_test_numbers import close, waves

BACKENDS = ("torch", "cpp", "triton")
CHUNK = 2**22  # logits that the reference forms at a time
PRECISIONS = ("fp32", "tf32", "tf32x3")  # of the products of float32 inputs; sums are float32
OF_HALF = {torch.float16: "fp16", torch.bfloat16: "bf16"}


def head_loss(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    out: Tensor,
    *,
    backend: str,
    bias: Tensor | None = None,
    precision: str = "fp32",
    ignore_index: int = IGNORED,
) -> None:
    """Write the loss of each row under a head, or under each of k heads, into `out`; no gradients.

    2 B C d k flops. "triton" forms logits in registers only: its memory is O(k B). "torch" and "cpp" form CHUNK of
    them at a time, or as many as one row has under one head: their memory does not grow with B or k beyond `out`.

    Args:
        hidden: [B, d] float16, bfloat16 or float32. Rows are samples, or tokens: losses of sequences are sums of out.
        head: [C, d], or [k, C, d]: the weights of k heads; of hidden's dtype.
        targets: [B] int64: class indices in [0, C), or `ignore_index`, whose loss is 0. Any other value: "torch" raises
            IndexError, "cpp" ValueError, "triton" gives NaN.
        out: [B], or [k, B] for k heads (a panel), float32, nats, changed; any strides.
        backend: "torch" (the reference), "cpp" (the same products, its losses compiled; CPU tensors) or "triton".
        bias: [C], or [k, C]; of hidden's dtype.
        precision: one of PRECISIONS, of products of float32 inputs. The reference's are float32 whatever is asked.

    Raises:
        TypeError, ValueError: a bad argument; nothing has been changed.
        BackendError: "triton" cannot run here.
    """
    check_word("backend", backend, BACKENDS)
    check_word("precision", precision, PRECISIONS)
    check_operands(hidden=hidden, head=head, targets=targets, out=out)
    if bias is not None:
        check_operands(bias=bias)
    ignore_index = check_ignored(ignore_index)
    _check(hidden, head, bias)
    check_targets_and_out(targets, out, (*head.shape[:-2], len(hidden)), hidden.device, "hidden")
    if head.ndim == 2:
        head, bias, out = head.unsqueeze(0), None if bias is None else bias.unsqueeze(0), out.unsqueeze(0)
    if backend != "triton":
        head_loss_reference(hidden, head, bias, targets, out, ignore_index, backend)
        return
    module = triton_kernels.load("head_loss", hidden.device)
    if out.numel():
        hidden, head = (x.detach() if x.stride(-1) == 1 else x.detach().contiguous() for x in (hidden, head))
        bias = None if bias is None else bias.detach().contiguous()
        chosen = OF_HALF.get(hidden.dtype, precision)
        module.head_loss(hidden, head, bias, targets.contiguous(), out, chosen, ignore_index)


def head_loss_reference(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    out: Tensor,
    ignore_index: int,
    loss_backend: str = "torch",
) -> None:
    """The same with logits, some rows under some heads at a time, for head [k, C, d], bias [k, C] and out [k, B].

    Several heads are one product, hidden @ [head 1; head 2; ...]', so that hidden states are read once for them.
    """
    num_classes = max(head.shape[1], 1)
    most_heads = max(1, CHUNK // (num_classes * max(min(len(hidden), 1024), 1)))
    for first in range(0, len(head), most_heads):
        some = slice(first, first + most_heads)
        weights = head[some].detach().float().flatten(0, 1).T  # [d, h C]
        shift = None if bias is None else bias[some].detach().float().flatten()
        count = max(1, CHUNK // max(weights.shape[1], 1))
        for start in range(0, len(hidden), count):
            rows = slice(start, start + count)
            logits = hidden[rows].detach().float() @ weights  # [r, h C]
            if shift is not None:
                logits += shift
            _losses_of_heads(logits, targets[rows], out[some, rows], ignore_index, loss_backend)


def _losses_of_heads(logits: Tensor, targets: Tensor, out: Tensor, ignore_index: int, backend: str) -> None:
    """out [h, r] from logits [r, h C], the classes of one head after those of another."""
    heads, rows = out.shape
    each = logits.view(rows * heads, -1)
    losses = torch.empty(rows * heads, device=out.device, dtype=torch.float32)
    sample_loss(each, targets.repeat_interleave(heads), losses, backend=backend, ignore_index=ignore_index)
    out.copy_(losses.view(rows, heads).T)


def _check(hidden: Tensor, head: Tensor, bias: Tensor | None) -> None:
    if hidden.ndim != 2 or hidden.dtype not in DTYPES:
        raise ValueError(f"hidden must be [B, d] float16, bfloat16 or float32, got {_describe(hidden)}")
    wanted = f"{str(hidden.dtype).removeprefix('torch.')} on {hidden.device}"
    alike = head.dtype == hidden.dtype and head.device == hidden.device
    if head.ndim not in (2, 3) or head.shape[-1] != hidden.shape[1] or not alike:
        raise ValueError(
            f"head must be [C, {hidden.shape[1]}] or [k, C, {hidden.shape[1]}] {wanted}, got {_describe(head)}, "
            f"beside hidden {_describe(hidden)}"
        )
    if bias is not None and (
        bias.shape != head.shape[:-1] or bias.dtype != hidden.dtype or bias.device != hidden.device
    ):
        raise ValueError(
            f"bias must be {list(head.shape[:-1])} {wanted}, got {_describe(bias)}, beside head {_describe(head)}"
        )


def _describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def self_test(module: ModuleType, device: torch.device) -> str:
    """The Triton kernel on two heads over several blocks of classes, in every precision; returns what differs."""
    targets = (torch.arange(9, device="cpu") * 7919) % 131
    for precision, slack in (("fp32", 1e-5), ("tf32", 1e-2), ("tf32x3", 1e-5), ("fp16", 2e-3), ("bf16", 2e-2)):
        for depth in (17, 32):
            dtype = HALF.get(precision, torch.float32)
            hidden, heads, bias = (waves(*shape).to(dtype) for shape in ((9, depth), (2, 131, depth), (2, 131)))
            out = torch.full((2, 9), float("nan"), device=device, dtype=torch.float32)
            expected = torch.zeros(2, 9, dtype=torch.float32, device="cpu")
            on_device = [x.to(device) for x in (hidden, heads, bias, targets)]
            module.head_loss(*on_device, out, precision, -100)
            head_loss_reference(hidden, heads, bias, targets, expected, -100)
            if not close(out, expected, slack):
                return f"{precision} losses of hidden states of size {depth} differ from the reference"
    return ""
