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

from lossk.data.trees import Collated
from lossk.ops.sample_loss import IGNORED, cross_entropy, cross_entropy_slopes
from lossk.task.criteria import Criterion, class_rows, recognize
from lossk.task.own_loss import Evaluated, name_of, per_sample_losses

# (model, batch) -> losses [B], or (losses [B, T], mask [B, T] bool); or a criterion of torch
LossFunction = Callable[[nn.Module, Any], Tensor | tuple[Tensor, Tensor]] | nn.Module | Callable[..., Tensor]

# The weights [m] float32 of a minibatch's losses, or what gives them for the losses [m] themselves.
Weights = Tensor | Callable[[Tensor], Tensor]

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
    # (losses of rows [R] detached, outputs [R, C], slopes): grad L_B = grad (slopes . outputs). Compiled, on a CPU.
    quick_slopes: Callable[[nn.Module, Any, float], tuple[Tensor, Tensor, Tensor]] | None = None
    quick_rows: Callable[[nn.Module, Any], Tensor] | None = None  # losses of rows [R] in float32, 0 where masked
    mean_tokens: float = 1.0  # unmasked tokens per training sample
    positions: int | None = None  # T of a loss per token, None of a loss per sample
    takes_outputs: bool = False  # formed from the model's outputs and the targets alone, and `check` wants the outputs
    token_name: str | None = None  # the name where it is a loss per token after all

    @property
    def unit(self) -> str:
        """What a row of the kernel and a term of L_n is."""
        return "samples" if self.positions is None else "tokens"

    def over_tokens(self, num_tokens: int, num_samples: int, positions: int) -> Loss:
        """This loss for training data with so many unmasked tokens."""
        name = self.token_name or self.name
        return dataclasses.replace(self, name=name, mean_tokens=num_tokens / num_samples, positions=positions)

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
            losses, outputs, slopes = self.quick_slopes(model, batch, self.mean_tokens)
            return losses.sum() / (len(split_batch(batch)[1]) * self.mean_tokens), outputs, slopes
        value = self.mean(model, batch)
        return value.detach(), value, None

    def singly(self, model: nn.Module, batch: Any) -> Tensor:
        """[B] float32, differentiable: `per_sample`, less exact for small losses where that is quicker."""
        if self.quick_rows is None:
            return self.per_sample(model, batch)
        return self._of_rows(self.quick_rows(model, batch), len(split_batch(batch)[1]))

    def _of_rows(self, losses: Tensor, size: int) -> Tensor:
        """[B]: `per_sample` of the losses of all rows, B of samples or B T of tokens."""
        return losses.view(size, -1).sum(dim=1) / self.mean_tokens

    def weighted(self, model: nn.Module, batch: Any, weights: Weights) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(losses [B], weights a [B], x, v), the first without a graph: sum_i a_i loss_i has the gradient of v . x."""
        if self.quick_slopes is None:
            each = self.singly(model, batch)
            weights = weights if isinstance(weights, Tensor) else weights(each.detach())
            return each.detach(), weights, each, weights
        losses, outputs, slopes = self.quick_slopes(model, batch, self.mean_tokens)
        size = len(split_batch(batch)[1])
        shares = self._of_rows(losses, size)
        weights = weights if isinstance(weights, Tensor) else weights(shares)
        return shares, weights, outputs, slopes * (size * weights).repeat_interleave(len(slopes) // size).unsqueeze(1)

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
            factor 1/2), a callable (model, batch) -> losses [B], or (losses [B, T], mask [B, T] bool), or torch's own
            `nn.CrossEntropyLoss(...)`, `F.mse_loss` and the like, or a `functools.partial` of one:
            `lossk.task.criteria`.
        backend: of the cross entropies.

    Raises:
        ValueError: an unknown name.
        TypeError: neither a name nor a callable, or one that cannot be called with (model, batch).
    """
    criterion = None if isinstance(loss, str) else recognize(loss, backend)
    if criterion is not None and criterion.name == "mse":
        loss = "mse"
    elif criterion is not None and criterion.name == "cross_entropy":
        return _plain_cross_entropy(criterion, backend)
    elif criterion is not None:
        return _wrap_criterion(criterion)
    if callable(loss):
        return Loss(name_of(loss), per_sample_losses(loss), lambda samples, outputs: None)
    if not isinstance(loss, str):
        raise TypeError(f"loss must be a name or a callable loss(model, batch), got {type(loss).__name__}")
    if loss == "cross_entropy":
        return Loss(
            "cross_entropy",
            partial(_cross_entropy_losses, backend=backend),
            _check_classes,
            _cross_entropy_mean,
            _slopes if backend == "cpp" else None,
            _rows,
            takes_outputs=True,
        )
    if loss == "token_cross_entropy":
        return Loss(
            "token_cross_entropy",
            partial(_token_losses, backend=backend),
            _check_tokens,
            _token_mean,
            _slopes if backend == "cpp" else None,
            _rows,
            takes_outputs=True,
        )
    if loss == "mse":
        return Loss("mse", _mse_losses, _check_regression, takes_outputs=True)
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
    batch = batch.batch if isinstance(batch, Collated) else batch
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


def _rows(model: nn.Module, batch: Any) -> Tensor:
    inputs, targets = split_batch(batch)
    return _row_losses(forward(model, inputs).float().flatten(0, -2), targets)


def _plain_rows(model: nn.Module, batch: Any) -> Tensor:
    inputs, targets = split_batch(batch)
    return _row_losses(class_rows(forward(model, inputs).float()), targets)


def _row_losses(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets.flatten().long(), ignore_index=IGNORED, reduction="none")


def _slopes(model: nn.Module, batch: Any, mean_tokens: float) -> tuple[Tensor, Tensor, Tensor]:
    inputs, targets = split_batch(batch)
    logits = forward(model, inputs).float().flatten(0, -2)
    return _slopes_of(logits, targets, mean_tokens)


def _plain_slopes(model: nn.Module, batch: Any, mean_tokens: float) -> tuple[Tensor, Tensor, Tensor]:
    inputs, targets = split_batch(batch)
    return _slopes_of(class_rows(forward(model, inputs).float()), targets, mean_tokens)


def _slopes_of(logits: Tensor, targets: Tensor, mean_tokens: float) -> tuple[Tensor, Tensor, Tensor]:
    scale = 1.0 / (len(targets) * mean_tokens)
    losses, slopes = cross_entropy_slopes(logits, targets.flatten().long(), scale, backend="cpp")
    return losses, logits, slopes


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


def _of_criterion(criterion: Criterion, model: nn.Module, batch: Any) -> Evaluated:
    inputs, targets = split_batch(batch)
    return criterion.losses(forward(model, inputs), targets)


def _check_criterion(criterion: Criterion, samples: Any, outputs: Tensor | None) -> None:
    criterion.check(split_batch(samples)[1], outputs)


def _wrap_criterion(criterion: Criterion) -> Loss:
    return Loss(
        criterion.name, partial(_of_criterion, criterion), partial(_check_criterion, criterion), takes_outputs=True
    )


def _plain_cross_entropy(criterion: Criterion, backend: str) -> Loss:
    """ "cross_entropy" itself for outputs [B, C]; for torch's [B, C, T] a loss per token of another name."""
    return Loss(
        "cross_entropy",
        partial(_of_criterion, criterion),
        partial(_check_criterion, criterion),
        _plain_mean,
        _plain_slopes if backend == "cpp" else None,
        _plain_rows,
        takes_outputs=True,
        token_name="cross_entropy of outputs [B, C, T]",
    )


def _plain_mean(model: nn.Module, batch: Any) -> Tensor:
    inputs, targets = split_batch(batch)
    logits = class_rows(forward(model, inputs).float())
    return F.cross_entropy(logits, targets.long().flatten(), ignore_index=IGNORED, reduction="sum") / len(targets)
