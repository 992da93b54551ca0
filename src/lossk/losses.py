"""Per-sample losses: the named ones, and the wrapping and checking of a caller's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossk.ops.sample_loss import cross_entropy

LossFunction = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Loss:
    """A loss as the rest of lossk uses it."""

    name: str
    per_sample: LossFunction  # (model, batch) -> [B] float32, nats
    mean: LossFunction  # (model, batch) -> scalar, differentiable: the minibatch loss L_B of SGLD
    check: Callable[[Any, Tensor | None], None]  # (all samples, outputs of the first ones): ValueError if unusable


def resolve_loss(loss: str | LossFunction) -> Loss:
    """Turn the `loss=` argument of the public API into a `Loss`.

    Args:
        loss: "cross_entropy" (logits [B, C], class indices [B]), "mse" (mean over the output's entries of the squared
            error; no factor 1/2), or a callable (model, batch) -> losses [B].

    Raises:
        ValueError: an unknown name.
        TypeError: neither a name nor a callable.
    """
    if callable(loss):
        return _wrap_callable(loss)
    if not isinstance(loss, str):
        raise TypeError(f"loss must be a name or a callable loss(model, batch), got {type(loss).__name__}")
    if loss == "cross_entropy":
        return Loss("cross_entropy", _cross_entropy_losses, _cross_entropy_mean, _check_classes)
    if loss == "mse":
        return Loss("mse", _mse_losses, lambda model, batch: _mse_losses(model, batch).mean(), _check_regression)
    raise ValueError(f"loss must be 'cross_entropy', 'mse' or a callable loss(model, batch), got {loss!r}")


def forward(model: nn.Module, inputs: Any) -> Tensor:
    """Apply the model to a batch's inputs: a tensor, a tuple of positional or a mapping of keyword arguments."""
    if isinstance(inputs, Mapping):
        outputs = model(**inputs)
    elif isinstance(inputs, tuple | list):
        outputs = model(*inputs)
    else:
        outputs = model(inputs)
    outputs = getattr(outputs, "logits", outputs)
    if not isinstance(outputs, Tensor):
        raise ValueError(
            f"loss: the model must return a tensor (or an object with .logits), got {type(outputs).__name__}; "
            "pass a callable loss(model, batch) for other outputs"
        )
    return outputs


def split_batch(batch: Any) -> tuple[Any, Tensor]:
    """The (inputs, targets) of a batch for the named losses."""
    if isinstance(batch, Sequence) and len(batch) == 2 and isinstance(batch[1], Tensor):
        return batch[0], batch[1]
    found = f"keys {sorted(batch)}" if isinstance(batch, Mapping) else f"{type(batch).__name__}"
    if isinstance(batch, Sequence):
        found += f" of length {len(batch)}"
    raise ValueError(
        f"loss: named losses need batches (inputs, targets), got {found}; pass a callable loss(model, batch)"
    )


def _cross_entropy_losses(model: nn.Module, batch: Any) -> Tensor:
    inputs, targets = split_batch(batch)
    return cross_entropy(forward(model, inputs), targets.long())


def _cross_entropy_mean(model: nn.Module, batch: Any) -> Tensor:
    # The gradient of the mean needs no relative accuracy in small losses, so the fused library form serves.
    inputs, targets = split_batch(batch)
    return F.cross_entropy(forward(model, inputs).float(), targets.long())


def _check_classes(samples: Any, outputs: Tensor | None) -> None:
    _, targets = split_batch(samples)
    if targets.is_floating_point() or targets.dtype == torch.bool or targets.ndim != 1:
        raise ValueError(
            "targets must be class indices, integers of shape [N], for loss='cross_entropy', "
            f"got {targets.dtype} of shape {list(targets.shape)}"
        )
    if outputs is None:
        return
    if outputs.ndim != 2:
        raise ValueError(
            f"loss='cross_entropy' needs model outputs of shape [B, C], got {list(outputs.shape)}; "
            "pass a callable loss(model, batch) that returns one loss per sample"
        )
    num_classes = outputs.shape[1]
    wrong = ((targets < 0) | (targets >= num_classes)).nonzero()
    if wrong.numel():
        i = int(wrong[0])
        raise ValueError(
            f"targets must lie in [0, {num_classes}), the model's classes; sample {i} has {int(targets[i])}"
        )


def _mse_losses(model: nn.Module, batch: Any) -> Tensor:
    inputs, targets = split_batch(batch)
    outputs = forward(model, inputs).float().flatten(1) if targets.ndim > 1 else forward(model, inputs).float()
    if targets.ndim == 1:
        outputs = outputs.reshape(targets.shape)
        return (outputs - targets.float()).square()
    return (outputs - targets.float().flatten(1)).square().mean(dim=1)


def _check_regression(samples: Any, outputs: Tensor | None) -> None:
    _, targets = split_batch(samples)
    if outputs is None:
        return
    wanted = list(targets.shape[1:])
    found = list(outputs.shape[1:])
    if found != wanted and not (wanted == [] and found == [1]):
        raise ValueError(
            f"loss='mse' needs outputs and targets of one shape per sample, got outputs {found} and targets {wanted}"
        )


def _wrap_callable(function: LossFunction) -> Loss:
    def per_sample(model: nn.Module, batch: Any) -> Tensor:
        losses = function(model, batch)
        size = batch_length(batch)
        if not isinstance(losses, Tensor):
            raise ValueError(f"loss must return a tensor of one loss per sample, got {type(losses).__name__}")
        if list(losses.shape) != [size]:
            hint = "; use reduction='none'" if losses.ndim == 0 else ""
            raise ValueError(f"loss must return one loss per sample, shape [{size}], got {list(losses.shape)}{hint}")
        if not losses.is_floating_point():
            raise ValueError(f"loss must return floating-point losses, got {losses.dtype}")
        return losses.float()

    name = f"{getattr(function, '__module__', '?')}:{getattr(function, '__qualname__', type(function).__name__)}"
    return Loss(name, per_sample, lambda model, batch: per_sample(model, batch).mean(), lambda samples, outputs: None)


def batch_length(batch: Any) -> int:
    """The number of samples in a batch: the first dimension of its first tensor."""
    if isinstance(batch, Tensor):
        return batch.shape[0]
    children = batch.values() if isinstance(batch, Mapping) else batch
    return batch_length(next(iter(children)))
