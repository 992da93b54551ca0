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

from lossk.ops import extension

IGNORED = -100  # the target of a token that does not count, as everywhere in torch


def cross_entropy(logits: Tensor, targets: Tensor, *, backend: str = "torch") -> Tensor:
    """Cross entropy of each sample, in nats.

    Args:
        logits: [B, C] floating point. The differences are formed in float64, so the result is limited only by the
            precision of the logits themselves.
        targets: [B] int64, class indices in [0, C), or -100, whose loss is 0.
        backend: "torch" (the reference) or "cpp" (on the CPU; no temporaries beside the logits). Where a gradient is
            wanted, or the logits are float64, the reference runs whatever the backend.

    Returns:
        [B] float32, differentiable in the logits.

    Raises:
        ValueError: "cpp", and a target out of range.
        BackendError: "cpp" cannot run here.
    """
    wants_gradient = logits.requires_grad and torch.is_grad_enabled()
    if backend == "cpp" and not wants_gradient and logits.dtype != torch.float64:
        return _compiled(logits.float(), targets)
    return cross_entropy_reference(logits, targets)


def _compiled(logits: Tensor, targets: Tensor) -> Tensor:
    rows, classes = logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    targets = targets.contiguous()
    out = torch.empty(rows, dtype=torch.float32)
    extension.load().sample_loss(
        logits=logits.data_ptr(),
        targets=targets.data_ptr(),
        out=out.data_ptr(),
        rows=rows,
        classes=classes,
        stride=logits.stride(0),
        num_threads=torch.get_num_threads(),
    )
    return out


def cross_entropy_reference(logits: Tensor, targets: Tensor) -> Tensor:
    """The equation above in plain torch: [B] float32."""
    ignored = targets == IGNORED
    targets = targets.masked_fill(ignored, 0)
    targets = targets.unsqueeze(1)  # [B, 1]
    wide = logits.double()
    gaps = wide - wide.gather(1, targets)
    gaps = gaps.scatter(1, targets, float("-inf"))  # the target itself is not summed
    peak = gaps.detach().amax(dim=1, keepdim=True).clamp(min=0.0)
    others = (gaps - peak).exp().sum(dim=1)
    peak = peak.squeeze(1)
    return (peak + (others + (-peak).expm1()).log1p()).float().masked_fill(ignored, 0.0)
