"""Whether a run's probe passes form their losses from hidden states: decided, tried and said."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lossk.data.data import Samples, few_of
from lossk.task.frozen import Frozen
from lossk.task.head import NAMES, FusedHead, NoHead, agreement, find_head
from lossk.task.losses import split_batch
from lossk.task.task import Task


def fuse_head(
    task: Task, samples: Samples, backend: str, frozen: Frozen | None = None
) -> tuple[FusedHead | None, list[str]]:
    """What forms the probe's losses without logits, if that was asked for and can be, and why (not).

    Args:
        samples: as the passes have them.
        backend: of `head_loss`.
        frozen: the calls of frozen modules that passes do without.

    Raises:
        ValueError: `Passes(fused_head=True)`, and the model has no head that can be taken off.
    """
    asked = task.passes.fused_head
    if asked is False or (asked == "auto" and backend != "triton"):
        return None, []
    try:
        if task.loss.name not in NAMES:
            raise NoHead(f"the loss is not one of {', '.join(NAMES)}")
        task.use_head(None)
        with task:
            few = samples[few_of(samples)]
            with torch.no_grad(), task.autocast():
                head = find_head(task.network, split_batch(few)[0], traced=frozen is None)
            found = FusedHead(head, task.loss.name == "token_cross_entropy", backend, task.precision, frozen)
            _check(task, found, few)
    except NoHead as reason:
        if asked is True:
            raise ValueError(f"fused_head=True: {reason}") from reason
        return None, [f"fused head = not used: {reason}"]
    return found, [f"fused head = used: {_describe(task, found)}"]


def _describe(task: Task, found: FusedHead) -> str:
    linear = found.head.linear
    several = "; only it is sampled, so several draws share one pass" if found.takes(task.sampled) else ""
    return (
        f"losses from {linear.in_features} hidden states, {linear.out_features} logits of each never kept"
        f" ({found.backend}){several}"
    )


def _check(task: Task, found: FusedHead, batch: Any) -> None:
    """Raise NoHead unless both ways agree on a batch, each sample or token, to the rounding of both."""
    with torch.no_grad(), task.autocast():
        plain, mask = task.loss.evaluate(task.network, batch)
        fused, same = found.evaluator()(batch)
        bound = agreement(found.head.body(split_batch(batch)[0]), found.head.linear, plain, found.precision)
    if (mask is None) != (same is None) or (mask is not None and same is not None and not torch.equal(mask, same)):
        raise NoHead("the fused loss masks other tokens")
    off = (fused.double() - plain.double()).abs().flatten() - bound
    counted = torch.ones_like(off, dtype=torch.bool) if mask is None else mask.flatten()
    if not bool((off[counted] <= 0).all()):
        worst = _worst(off[counted])
        raise NoHead(f"fused and plain losses differ by {worst:.2g} nats more than rounding explains")


def _worst(excess: Tensor) -> float:
    return float(excess.nan_to_num(nan=float("inf")).amax())
