"""Per-sample cross entropy, exact to about 1e-6 relative for losses from 1e-38 upward.

The textbook form, log-sum-exp minus the target logit, cannot represent a loss below about 6e-8 in float32: well
classified samples come out as rounding noise, and so do their correlations. Measured from the target logit instead,

    d_c = x_c - x_target,   M = max(0, max_{c != target} d_c),
    loss = M + log1p( sum_{c != target} exp(d_c - M) + expm1(-M) ),

which for a winning target (M = 0) is log1p(sum exp d_c): small losses keep their leading digits.
"""

from __future__ import annotations

import torch
from torch import Tensor

BACKENDS = ("torch", "triton")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
IGNORED = -100  # torch's convention


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of each sample, in nats.

    Args:
        logits: [B, C] floating point. The differences are formed in float64, so the result is limited only by the
            precision of the logits themselves.
        targets: [B] int64, class indices in [0, C).

    Returns:
        [B] float32, differentiable in the logits.
    """
    targets = targets.unsqueeze(1)  # [B, 1]
    wide = logits.double()
    gaps = wide - wide.gather(1, targets)
    gaps = gaps.scatter(1, targets, float("-inf"))  # the target itself is not summed
    peak = gaps.detach().amax(dim=1, keepdim=True).clamp(min=0.0)
    others = (gaps - peak).exp().sum(dim=1)
    peak = peak.squeeze(1)
    return (peak + (others + (-peak).expm1()).log1p()).float()


def sample_loss(logits: Tensor, targets: Tensor, out: Tensor, *, backend: str, ignore_index: int = IGNORED) -> None:
    """Write the cross entropy of each sample into `out`, for instance a slice of a panel's row; no gradients.

    Args:
        logits: [B, C] float16, bfloat16 or float32; for "triton" with adjacent columns.
        targets: [B] int64: class indices in [0, C), or `ignore_index`, whose loss is 0: a mask of tokens is written
            that way. Any other value: "torch" raises IndexError, "triton" gives NaN (a GPU cannot raise).
        out: [B] float32, nats, changed; any stride.
        backend: "torch" (the reference) or "triton".

    Raises:
        ValueError: a bad argument; nothing has been changed.
        BackendError: "triton" cannot run here.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if logits.ndim != 2 or logits.dtype not in DTYPES:
        raise ValueError(f"logits must be [B, C] float16, bfloat16 or float32, got {_describe(logits)}")
    check_targets_and_out(targets, out, (len(logits),), logits.device)
    if backend == "torch":
        sample_loss_reference(logits, targets, out, ignore_index)
        return
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        raise ValueError(f"logits must have adjacent columns for backend='triton', got strides {logits.stride()}")
    from lossk.ops import triton_kernels

    module = triton_kernels.load("sample_loss", logits.device)
    if len(logits):
        module.sample_loss(logits.detach(), targets.contiguous(), out, ignore_index)


def sample_loss_reference(logits: Tensor, targets: Tensor, out: Tensor, ignore_index: int) -> None:
    """The same in plain torch."""
    ignored = targets == ignore_index
    with torch.no_grad():
        out.copy_(cross_entropy(logits, targets.masked_fill(ignored, 0)).masked_fill(ignored, 0.0))


def check_targets_and_out(targets: Tensor, out: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise unless targets are [B] int64 and out is `shape` ([B], or [k, B]) float32, on `device`."""
    if targets.shape != shape[-1:] or targets.dtype != torch.int64 or targets.device != device:
        raise ValueError(f"targets must be [{shape[-1]}] int64 on {device}, got {_describe(targets)}")
    if out.shape != shape or out.dtype != torch.float32 or out.device != device:
        raise ValueError(f"out must be {list(shape)} float32 on {device}, got {_describe(out)}")


def _describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
