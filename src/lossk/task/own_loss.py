"""A caller's own loss(model, batch): whether it can be called so, what it returns, and what it is called."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lossk.data.trees import Collated, leaves, map_tensors
from lossk.task.criteria import WRITE, spell

Evaluated = tuple[Tensor, Tensor | None]  # losses [B] and None, or losses [B, T] and mask [B, T] bool; float32, nats


def per_sample_losses(function: Callable[..., Any]) -> Callable[[nn.Module, Any], Evaluated]:
    """The caller's loss with what it returns checked: one loss per sample, or losses and mask of tokens.

    Raises:
        TypeError: it cannot be called with (model, batch).
    """
    _check_signature(function)

    def evaluate(model: nn.Module, batch: Any) -> Evaluated:
        if isinstance(batch, Collated):
            size, given = batch.size, batch.batch
        else:
            size = batch_length(batch)
            given = batch if isinstance(batch, Tensor) else map_tensors(lambda t: t, batch)  # a loss may take it apart
        losses = _call(function, model, given)
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

    return evaluate


def _check_signature(function: Callable[..., Any]) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a built-in without one
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise TypeError(
            f"loss must take (model, batch), but {name_of(function)}{signature}: {error}. {WRITE}"
        ) from None


def _call(function: Callable[..., Any], model: nn.Module, batch: Any) -> Any:
    """function(model, batch), where a criterion, which expects outputs for the model, is told from a mistake in it."""
    try:
        return function(model, batch)
    except (TypeError, AttributeError) as error:
        if not isinstance(function, type) and type(model).__name__ not in str(error):
            raise
        raise TypeError(
            f"loss {name_of(function)} was called with (model, batch) and raised {type(error).__name__}: {error}. "
            f"{WRITE}"
        ) from error


def name_of(function: Any) -> str:
    """Module and name; of a `partial` with its arguments, so that other options are another name."""
    if isinstance(function, partial):
        values = [*map(spell, function.args), *(f"{key}={spell(value)}" for key, value in function.keywords.items())]
        return f"{name_of(function.func)}({', '.join(values)})"
    return f"{getattr(function, '__module__', '?')}:{getattr(function, '__qualname__', type(function).__name__)}"


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
    return leaves(batch)[0].shape[0]
