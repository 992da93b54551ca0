"""Whether the gradient of a loss is its slope: what steps a chain is what its draws read. In float32 throughout."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lossk.task.task import Task, dense

MOVED = 0.01  # relative move of the weights after which losses must still follow from them
ROUNDING = 2.0**-23  # of a weight, relatively, in float32
APART = 0.5  # a slope this far, relatively, from what the gradient foretells is told; kinks and curvature explain less
STEP = 1e-3  # of the mean loss, and at least 3e-5 of the largest: what a step along the gradient is to change it by


def check_gradient(task: Task, few: Callable[[], Any], rows: Tensor, allowed: float) -> None:
    """Every sampled weight that moves the losses has a gradient, and the gradient is the slope of the mean loss.

    Args:
        few: a few samples, anew at each call: a loss may take its batch apart.
        rows: their losses, at w*.
        allowed: nats by which rounding may move a loss.

    Raises:
        ValueError: the loss changes with weights that its gradient does not reach.

    Warns:
        UserWarning: the slope along the gradient is another one.
    """
    mean, found = _gradient(task, few())
    unreached = [name for name, part in zip(task.names, found, strict=True) if part is None]
    if unreached:
        with moved(task, MOVED, seed=0, whole=True):
            _keep_moved(task, set(unreached))
            changed = task.rows(few())[0]
        if not (changed.shape == rows.shape and bool(((changed - rows).abs() <= allowed).all())):
            raise ValueError(
                f"loss changes with parameters that its gradient does not reach: {', '.join(unreached[:4])}; the model "
                "or the loss takes them out of the graph (detach(), no_grad(), a cache, or reentrant checkpointing, "
                "which use_reentrant=False replaces). Keep them in it, or leave them out of what is sampled (params=)"
            )
    _tell_another_slope(task, few, mean, found, STEP * max(abs(mean), 0.03 * float(rows.abs().amax())))


def _gradient(task: Task, batch: Any) -> tuple[float, list[Tensor | None]]:
    """The mean loss, and its gradient in each sampled parameter; None where the graph does not lead to it."""
    with torch.enable_grad():
        mean = task.loss.per_sample(task.run_model, batch).mean()
        if not mean.requires_grad:
            raise ValueError("loss must depend on the sampled parameters, but has no gradient")
        return float(mean.detach()), list(torch.autograd.grad(mean, task.sampled, allow_unused=True))


def _keep_moved(task: Task, names: set[str]) -> None:
    """Put all other weights back."""
    offset = 0
    for name, parameter in zip(task.names, task.sampled, strict=True):
        span = slice(offset, offset + parameter.numel())
        if name not in names:
            task.flat[span] = task.anchor[span]
        offset = span.stop


def _tell_another_slope(
    task: Task, few: Callable[[], Any], mean: float, found: list[Tensor | None], change: float
) -> None:
    """Warn where steps along and against the gradient change the mean loss by something else than it foretells.

    Nothing is told where the rounding of weights in float32 alone moves the loss as far as a step does.
    """
    parts = [torch.zeros_like(p) if g is None else dense(g) for p, g in zip(task.sampled, found, strict=True)]
    task.grad.copy_(task.flatten(parts))
    square = float(task.grad.square().sum(dtype=torch.float64))
    step = change / square if square > 0.0 else 0.0
    if not 0.0 < step < math.inf:  # a loss of 0, or none that moves
        return

    def mean_here() -> float:
        with torch.no_grad():
            return float(task.loss.per_sample(task.run_model, few()).double().mean())

    means = []
    for sign in (1.0, -1.0):
        task.flat.add_(task.grad, alpha=sign * step)
        means.append(mean_here())
        task.reset()
    slope, bend = (means[0] - means[1]) / (2 * step), (means[0] + means[1] - 2 * mean) / (2 * step)
    if abs(bend) > APART / 2 * square or abs(slope - square) <= APART * square:
        return
    with moved(task, ROUNDING, seed=0):
        if abs(mean_here() - mean) > APART / 4 * change:  # as at a w* that fits all samples
            return
    warnings.warn(
        f"the gradient of the loss is not its slope: along the gradient the mean loss changes at {slope:.3g} of the "
        f"{square:.3g} that it foretells (a gradient hook, a straight-through estimator, detach()?). Chains follow the "
        "gradient, so what they sample is not the law of this loss",
        UserWarning,
        stacklevel=2,
    )


@contextmanager
def moved(task: Task, size: float, seed: int, *, whole: bool = False) -> Iterator[None]:
    """Every sampled weight off by a random relative error; `task.grad` is scratch, and w* is back afterwards.

    Args:
        whole: relative to the root mean square of all weights besides, so that weights of 0 move too.
    """
    generator = torch.Generator(task.device).manual_seed(seed)
    task.grad.normal_(generator=generator)
    task.flat.addcmul_(task.flat, task.grad, value=size)
    if whole:
        typical = float(torch.linalg.vector_norm(task.anchor)) / task.num_weights**0.5
        task.flat.add_(task.grad, alpha=size * (typical or 1.0))
    try:
        yield
    finally:
        task.reset()
