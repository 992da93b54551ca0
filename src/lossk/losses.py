"""Per-sample and per-token losses: the named ones, and the wrapping and checking of a caller's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossk.ops.sample_loss import IGNORED, cross_entropy, cross_entropy_slopes

# (model, batch) -> losses [B], or (losses [B, T], mask [B, T] bool)
LossFunction = Callable[[nn.Module, Any], Tensor | tuple[Tensor, Tensor]]
Evaluated = tuple[Tensor, Tensor | None]  # losses [B] and None, or losses [B, T] and mask [B, T] bool; float32, nats

CHUNK = 2**22  # logits whose exact cross entropy is formed at a time, in float64


@dataclass(frozen=True)
class Loss:
    """A loss as the rest of lossk uses it.

    A sample's share of the training loss L_n is its own loss or, of a loss per token, the sum over its unmasked tokens
    divided by `mean_tokens`. The mean over all training samples is then the mean over all unmasked tokens, and the mean
    over a minibatch is an unbiased estimate of it, linear in the samples (the mean over the minibatch's own tokens is
    neither: it weighs a token by how few others happen to be in its minibatch).
    """

    name: str
    evaluate: Callable[[nn.Module, Any], Evaluated]
    check: Callable[[Any, Tensor | None], None]  # (all samples, outputs of the first ones): ValueError if unusable
    quick_mean: Callable[[nn.Module, Any], Tensor] | None = None  # the sum of all losses of a batch, divided by B
    # (L_B detached, outputs, slopes), the slopes held fixed: grad L_B = grad (slopes . outputs). Compiled, on a CPU.
    quick_slopes: Callable[[nn.Module, Any, float], tuple[Tensor, Tensor, Tensor]] | None = None
    mean_tokens: float = 1.0  # unmasked tokens per training sample
    positions: int | None = None  # T of a loss per token, None of a loss per sample

    @property
    def takes_outputs(self) -> bool:
        """Whether it is a function of the model's outputs and the targets alone."""
        return self.name in ("cross_entropy", "token_cross_entropy", "mse")

    @property
    def unit(self) -> str:
        """What a row of the kernel and a term of L_n is."""
        return "samples" if self.positions is None else "tokens"

    def over_tokens(self, num_tokens: int, num_samples: int, positions: int) -> Loss:
        """This loss for training data with so many unmasked tokens."""
        return dataclasses.replace(self, mean_tokens=num_tokens / num_samples, positions=positions)

    def num_terms(self, num_samples: int) -> int:
        """n, the terms of the training loss: its samples, or their unmasked tokens."""
        return round(num_samples * self.mean_tokens)

    def per_sample(self, model: nn.Module, batch: Any) -> Tensor:
        """[B] float32, nats: each sample's share of the training loss, whose mean over a minibatch is L_B."""
        return self.shares(*self.evaluate(model, batch))

    def shares(self, losses: Tensor, mask: Tensor | None) -> Tensor:
        """[B]: `per_sample` of losses that are there already."""
        if mask is None:
            return losses
        return losses.masked_fill(~mask, 0.0).sum(dim=1) / self.mean_tokens

    def mean(self, model: nn.Module, batch: Any) -> Tensor:
        """Scalar, differentiable: the minibatch loss L_B."""
        if self.quick_mean is None:
            return self.per_sample(model, batch).mean()
        return self.quick_mean(model, batch) / self.mean_tokens

    def differentiable(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """(L_B without a graph, x, v): L_B's gradient is that of v . x with v held fixed, or of x itself (v None).

        Cross entropies leave autograd at the logits: their slopes come with the losses, from one compiled pass.
        """
        if self.quick_slopes is not None:
            return self.quick_slopes(model, batch, self.mean_tokens)
        value = self.mean(model, batch)
        return value.detach(), value, None

    def rows(self, model: nn.Module, batch: Any) -> Evaluated:
        """The batch's rows of the kernel: losses [R] float32, of its samples or its unmasked tokens; and the mask."""
        return self.select(*self.evaluate(model, batch))

    def select(self, losses: Tensor, mask: Tensor | None) -> Evaluated:
        """`rows` of losses that are there already, [B] or [B, T] each, or [k, B] or [k, B, T] of k draws."""
        return (losses, None) if mask is None else (losses[..., mask], mask)


def resolve_loss(loss: str | LossFunction, backend: str = "torch") -> Loss:
    """Turn the `loss=` argument of the public API into a `Loss`.

    Args:
        loss: "cross_entropy" (logits [B, C], class indices [B]), "token_cross_entropy" (logits [B, T, C], class indices
            [B, T], -100 where a token does not count), "mse" (mean over the output's entries of the squared error; no
            factor 1/2), or a callable (model, batch) -> losses [B], or (losses [B, T], mask [B, T] bool).
        backend: of the cross entropies.

    Raises:
        ValueError: an unknown name.
        TypeError: neither a name nor a callable.
    """
    if callable(loss):
        return _wrap_callable(loss)
    if not isinstance(loss, str):
        raise TypeError(f"loss must be a name or a callable loss(model, batch), got {type(loss).__name__}")
    if loss == "cross_entropy":
        return Loss(
            "cross_entropy",
            partial(_cross_entropy_losses, backend=backend),
            _check_classes,
            _cross_entropy_mean,
            _slopes if backend == "cpp" else None,
        )
    if loss == "token_cross_entropy":
        return Loss(
            "token_cross_entropy",
            partial(_token_losses, backend=backend),
            _check_tokens,
            _token_mean,
            _slopes if backend == "cpp" else None,
        )
    if loss == "mse":
        return Loss("mse", _mse_losses, _check_regression)
    raise ValueError(
        f"loss must be 'cross_entropy', 'token_cross_entropy', 'mse' or a callable loss(model, batch), got {loss!r}"
    )


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


def _cross_entropy_losses(model: nn.Module, batch: Any, *, backend: str) -> Evaluated:
    inputs, targets = split_batch(batch)
    return cross_entropy(forward(model, inputs), targets.long(), backend=backend), None


def _cross_entropy_mean(model: nn.Module, batch: Any) -> Tensor:
    # The gradient of the mean needs no relative accuracy in small losses, so the fused library form serves.
    inputs, targets = split_batch(batch)
    return F.cross_entropy(forward(model, inputs).float(), targets.long())


def _token_losses(model: nn.Module, batch: Any, *, backend: str) -> Evaluated:
    inputs, targets = split_batch(batch)
    logits, wanted = forward(model, inputs).flatten(0, 1), targets.flatten().long()  # [B T, C], [B T]
    chunk = max(1, CHUNK // logits.shape[1])
    pairs = zip(logits.split(chunk), wanted.split(chunk), strict=True)
    losses = [cross_entropy(x, y, backend=backend) for x, y in pairs]
    return torch.cat(losses).view(targets.shape), targets != IGNORED


def _token_mean(model: nn.Module, batch: Any) -> Tensor:
    inputs, targets = split_batch(batch)
    logits = forward(model, inputs).float().flatten(0, 1)
    total = F.cross_entropy(logits, targets.long().flatten(), ignore_index=IGNORED, reduction="sum")
    return total / len(targets)


def _slopes(model: nn.Module, batch: Any, mean_tokens: float) -> tuple[Tensor, Tensor, Tensor]:
    inputs, targets = split_batch(batch)
    logits = forward(model, inputs).float().flatten(0, -2)
    scale = 1.0 / (len(targets) * mean_tokens)
    losses, slopes = cross_entropy_slopes(logits, targets.flatten().long(), scale, backend="cpp")
    return scale * losses.sum(), logits, slopes


def _are_indices(targets: Tensor, ndim: int) -> bool:
    return not (targets.is_floating_point() or targets.dtype == torch.bool) and targets.ndim == ndim


def _check_classes(samples: Any, outputs: Tensor | None) -> None:
    _, targets = split_batch(samples)
    if not _are_indices(targets, 1):
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


def _check_tokens(samples: Any, outputs: Tensor | None) -> None:
    _, targets = split_batch(samples)
    if not _are_indices(targets, 2):
        raise ValueError(
            "targets must be class indices, integers of shape [N, T], -100 where a token does not count, for "
            f"loss='token_cross_entropy', got {targets.dtype} of shape {list(targets.shape)}"
        )
    if outputs is None:
        return
    if outputs.ndim != 3 or outputs.shape[1] != targets.shape[1]:
        raise ValueError(
            f"loss='token_cross_entropy' needs model outputs of shape [B, {targets.shape[1]}, C], one row of logits "
            f"per target (shifted beforehand: position t's target is what it predicts), got {list(outputs.shape)}"
        )
    num_classes = outputs.shape[2]
    wrong = ((targets != IGNORED) & ((targets < 0) | (targets >= num_classes))).nonzero()
    if wrong.numel():
        i, t = wrong[0].tolist()
        raise ValueError(
            f"targets must lie in [0, {num_classes}), the model's classes, or be -100; sample {i}, position {t} has "
            f"{int(targets[i, t])}"
        )


def _mse_losses(model: nn.Module, batch: Any) -> Evaluated:
    inputs, targets = split_batch(batch)
    outputs = forward(model, inputs).float().flatten(1) if targets.ndim > 1 else forward(model, inputs).float()
    if targets.ndim == 1:
        outputs = outputs.reshape(targets.shape)
        return (outputs - targets.float()).square(), None
    return (outputs - targets.float().flatten(1)).square().mean(dim=1), None


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
    def evaluate(model: nn.Module, batch: Any) -> Evaluated:
        losses, size = function(model, batch), batch_length(batch)
        if isinstance(losses, tuple):
            return _checked_tokens(losses, size)
        if not isinstance(losses, Tensor):
            raise ValueError(f"loss must return a tensor of one loss per sample, got {type(losses).__name__}")
        if list(losses.shape) != [size]:
            hint = "; use reduction='none'" if losses.ndim == 0 else ""
            if losses.ndim == 2:
                hint = "; for a loss per token return (losses [B, T], mask [B, T] bool), True where the token counts"
            raise ValueError(f"loss must return one loss per sample, shape [{size}], got {list(losses.shape)}{hint}")
        _check_floating(losses)
        return losses.float(), None

    name = f"{getattr(function, '__module__', '?')}:{getattr(function, '__qualname__', type(function).__name__)}"
    return Loss(name, evaluate, lambda samples, outputs: None)


def _checked_tokens(returned: tuple[Any, ...], size: int) -> Evaluated:
    kinds = ", ".join(f"{list(v.shape)} {v.dtype}" if isinstance(v, Tensor) else type(v).__name__ for v in returned)
    rule = (
        f"loss must return losses [{size}] or a tuple (losses [{size}, T], mask [{size}, T] bool), got tuple ({kinds})"
    )
    if len(returned) != 2 or not all(isinstance(value, Tensor) for value in returned):
        raise ValueError(rule)
    losses, mask = returned
    if losses.ndim != 2 or len(losses) != size or mask.shape != losses.shape or mask.dtype != torch.bool:
        raise ValueError(rule)
    _check_floating(losses)
    return losses.float(), mask.to(losses.device)


def _check_floating(losses: Tensor) -> None:
    if not losses.is_floating_point():
        raise ValueError(f"loss must return floating-point losses, got {losses.dtype}")


def batch_length(batch: Any) -> int:
    """The number of samples in a batch: the first dimension of its first tensor."""
    if isinstance(batch, Tensor):
        return batch.shape[0]
    children = batch.values() if isinstance(batch, Mapping) else batch
    return batch_length(next(iter(children)))
