"""Per-sample cross entropy, exact to about 1e-6 relative for losses from 1e-38 upward.

The textbook form, log-sum-exp minus the target logit, cannot represent a loss below about 6e-8 in float32: well
classified samples come out as rounding noise, and so do their correlations. Measured from the target logit instead,

    d_c = x_c - x_target,   M = max(0, max_{c != target} d_c),
    loss = M + log1p( sum_{c != target} exp(d_c - M) + expm1(-M) ),

which for a winning target (M = 0) is log1p(sum exp d_c): small losses keep their leading digits. The compiled form
measures the exponents from the largest other logit m instead, so that their float32 sum is at least 1 and as exact as
float64 would need it, and forms m - x_target in float64 (csrc/loss_loop.hpp).

The gradient of a minibatch loss is that of sum_i slope_i . logits_i with the slopes (softmax - onehot) held fixed:
`cross_entropy_slopes` gives them with the losses, in one pass over the logits.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from lossk.operands import check_ignored, check_operands, check_scale, check_word
from lossk.ops import extension, triton_kernels
from lossk.ops.self_test_numbers import close, waves

BACKENDS = ("torch", "cpp", "triton")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
IGNORED = -100  # the target of a token that does not count, as everywhere in torch


def cross_entropy(logits: Tensor, targets: Tensor, *, backend: str = "torch") -> Tensor:
    """Cross entropy of each sample, in nats.

    Args:
        logits: [B, C] floating point. The difference from the target is formed in float64 (on a GPU in float32
            pairs), so the result is limited only by the precision of the logits themselves.
        targets: [B] int64, class indices in [0, C), or -100, whose loss is 0.
        backend: "torch" (the reference), "cpp" or "triton". Where a gradient is wanted, or the logits are float64, the
            reference runs whatever the backend.

    Returns:
        [B] float32, differentiable in the logits.

    Raises:
        BackendError: the backend cannot run here.
    """
    check_word("backend", backend, BACKENDS)
    _check_logits(logits, targets)
    wants_gradient = logits.requires_grad and torch.is_grad_enabled()
    if backend == "torch" or wants_gradient or logits.dtype not in DTYPES:
        return cross_entropy_reference(logits, targets)
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    out = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    if backend == "cpp":
        _compiled(logits.detach(), targets, out, IGNORED)
    else:
        sample_loss(logits, targets, out, backend=backend)
    return out


def cross_entropy_slopes(logits: Tensor, targets: Tensor, scale: float, *, backend: str) -> tuple[Tensor, Tensor]:
    """Losses, and the derivatives of `scale` times their sum by the logits; neither is differentiable.

    Args:
        logits: [B, C] float16, bfloat16 or float32 (any floating point for "torch").
        targets: as in `cross_entropy`; the slopes of an ignored one are 0.
        scale: of the slopes: 1 / B for those of the mean.
        backend: "torch" (the reference) or "cpp".

    Returns:
        [B] and [B, C] float32. A target's slope, softmax - 1, keeps its digits however small the loss.

    Raises:
        BackendError: the backend cannot run here.
    """
    check_word("backend", backend, ("torch", "cpp"))
    _check_logits(logits, targets)
    scale, logits = check_scale(scale), logits.detach()
    if backend != "cpp" or logits.dtype not in DTYPES:
        return _slopes_reference(logits, targets, scale)
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    losses = torch.empty(len(logits), dtype=torch.float32, device="cpu")
    slopes = torch.empty(logits.shape, dtype=torch.float32, device="cpu")
    _compiled(logits, targets, losses, IGNORED, slopes, scale)
    return losses, slopes


def _slopes_reference(logits: Tensor, targets: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    wide = logits.double().requires_grad_(True)
    with torch.enable_grad():
        losses = cross_entropy_reference(wide, targets)
        (slopes,) = torch.autograd.grad(losses.sum(), wide)
    return losses.detach(), (scale * slopes).float()


def cross_entropy_reference(logits: Tensor, targets: Tensor) -> Tensor:
    """The equation above in plain torch: [B] float32."""
    ignored = targets == IGNORED
    targets = targets.masked_fill(ignored, 0).unsqueeze(1)  # [B, 1]
    wide = logits.double()
    gaps = wide - _of_targets(wide, targets)
    gaps = gaps.scatter(1, targets, float("-inf"))  # the target itself is not summed
    peak = gaps.detach().amax(dim=1, keepdim=True).clamp(min=0.0)
    others = (gaps - peak).exp().sum(dim=1)
    peak = peak.squeeze(1)
    return (peak + (others + (-peak).expm1()).log1p()).float().masked_fill(ignored, 0.0)


def _of_targets(logits: Tensor, targets: Tensor) -> Tensor:
    """The target's logit: [B, 1]."""
    try:
        return logits.gather(1, targets)
    except (RuntimeError, IndexError) as error:
        classes = logits.shape[1]
        bad = targets[(targets < 0) | (targets >= classes)]
        if not len(bad):
            raise
        raise IndexError(f"targets must lie in [0, {classes}), the columns of logits, got {int(bad[0])}") from error


def sample_loss(logits: Tensor, targets: Tensor, out: Tensor, *, backend: str, ignore_index: int = IGNORED) -> None:
    """Write the cross entropy of each sample into `out`, for instance a slice of a panel's row; no gradients.

    Args:
        logits: [B, C] float16, bfloat16 or float32; for "cpp" and "triton" with adjacent columns.
        targets: [B] int64: class indices in [0, C), or `ignore_index`, whose loss is 0: a mask of tokens is written
            that way. Any other value: "torch" raises IndexError, "cpp" ValueError, "triton" gives NaN, as a GPU
            cannot raise.
        out: [B] float32, nats, changed; any stride.
        backend: "torch" (the reference), "cpp" (CPU tensors) or "triton".

    Raises:
        ValueError: a bad argument; nothing has been changed.
        BackendError: the backend cannot run here.
    """
    check_word("backend", backend, BACKENDS)
    check_operands(logits=logits, targets=targets, out=out)
    ignore_index = check_ignored(ignore_index)
    if logits.ndim != 2 or logits.dtype not in DTYPES:
        raise ValueError(f"logits must be [B, C] float16, bfloat16 or float32, got {_describe(logits)}")
    check_targets_and_out(targets, out, (len(logits),), logits.device, "logits")
    if backend == "torch":
        sample_loss_reference(logits, targets, out, ignore_index)
        return
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        raise ValueError(f"logits must have adjacent columns for backend={backend!r}, got strides {logits.stride()}")
    if backend == "cpp":
        _compiled(logits.detach(), targets, out, ignore_index)
        return
    module = triton_kernels.load("sample_loss", logits.device)
    if len(logits):
        module.sample_loss(logits.detach(), targets.contiguous(), out, ignore_index)


def _compiled(
    logits: Tensor,
    targets: Tensor,
    out: Tensor,
    ignore_index: int,
    slopes: Tensor | None = None,
    slope_scale: float = 1.0,
) -> None:
    if logits.device.type != "cpu":
        raise ValueError(f"logits must be on the CPU for backend='cpp', got {logits.device}")
    logits, targets = logits.float(), targets.contiguous()
    if ignore_index != IGNORED:
        targets = targets.masked_fill(targets == ignore_index, IGNORED)
    rows, classes = logits.shape
    if rows == 0:
        return
    losses = out if out.is_contiguous() else torch.empty(rows, dtype=torch.float32, device="cpu")
    extension.load().sample_loss(
        logits=logits.data_ptr(),
        targets=targets.data_ptr(),
        out=losses.data_ptr(),
        rows=rows,
        classes=classes,
        stride=logits.stride(0),
        slopes=0 if slopes is None else slopes.data_ptr(),
        slope_scale=slope_scale,
        num_threads=torch.get_num_threads(),
    )
    if losses is not out:
        out.copy_(losses)


def sample_loss_reference(logits: Tensor, targets: Tensor, out: Tensor, ignore_index: int) -> None:
    """The same in plain torch."""
    ignored = targets == ignore_index
    with torch.no_grad():
        out.copy_(cross_entropy_reference(logits, targets.masked_fill(ignored, 0)).masked_fill(ignored, 0.0))


def check_targets_and_out(
    targets: Tensor, out: Tensor, shape: tuple[int, ...], device: torch.device, beside: str
) -> None:
    """Raise unless targets are [B] int64 and out is `shape` ([B], or [k, B]) float32, on `device`."""
    if targets.shape != shape[-1:] or targets.dtype != torch.int64 or targets.device != device:
        raise ValueError(f"targets must be [{shape[-1]}] int64 on {device}, got {_describe(targets)}, beside {beside}")
    if out.shape != shape or out.dtype != torch.float32 or out.device != device:
        raise ValueError(f"out must be {list(shape)} float32 on {device}, got {_describe(out)}, beside {beside}")


def _check_logits(logits: Tensor, targets: Tensor) -> None:
    """Raise unless logits are [B, C] floating point, C at least 1, and targets [B] int64 there."""
    check_operands(logits=logits, targets=targets)
    if logits.ndim != 2 or logits.shape[1] < 1 or not logits.is_floating_point():
        raise ValueError(f"logits must be [B, C] floating point, C at least 1, got {_describe(logits)}")
    if targets.shape != logits.shape[:1] or targets.dtype != torch.int64 or targets.device != logits.device:
        raise ValueError(
            f"targets must be [{len(logits)}] int64 on {logits.device}, got {_describe(targets)}, "
            f"beside logits {_describe(logits)}"
        )


def _describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def self_test(module: ModuleType, device: torch.device) -> str:
    """The Triton kernel on losses from 1e-35 to 100, one and several blocks of columns; returns what differs."""
    for num_classes in (5, 4099):
        logits, targets = _classification(6, num_classes)
        out = torch.full((6,), float("nan"), device=device, dtype=torch.float32)
        module.sample_loss(logits.to(device), targets.to(device), out, -100)
        if not close(out, cross_entropy(logits, targets), 1e-6):
            return f"losses of {num_classes} classes differ from the reference"
    return ""


def _classification(batch: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """Logits [B, C] whose targets win by up to 80 or lose by up to 100, and the targets [B]."""
    logits = waves(batch, num_classes)
    rows = torch.arange(batch, device="cpu")
    targets = (rows * 7919) % num_classes
    logits[rows, targets] = torch.linspace(-100.0, 80.0, batch, dtype=torch.float32, device="cpu")
    return logits, targets
