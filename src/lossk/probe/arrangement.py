"""How model and data are arranged for a run's passes: cut, rewritten, laid out; and proven to be the user's model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from lossk.data.data import Samples
from lossk.data.trees import leaves
from lossk.memory import Budget
from lossk.probe.frozen_outputs import keep_outputs
from lossk.probe.head_choice import fuse_head
from lossk.probe.prefix_cache import cut_prefix
from lossk.probe.probe import Probe
from lossk.task.agreement import check_passes
from lossk.task.frozen import Frozen
from lossk.task.head import FusedHead
from lossk.task.losses import Loss
from lossk.task.passes import Passes
from lossk.task.prefix import NoCut
from lossk.task.task import Task

REWRITINGS = ("compile", "fold_norms", "fused_head", "memory_format", "frozen_prefix")  # in the order they are doubted


@dataclass(frozen=True)
class Arrangement:
    """What the passes run, and on what."""

    passes: Passes
    probe: Probe
    train: Samples
    suffix: nn.Module | None  # what runs in the model's place, on activations at a cut
    arguments: tuple[int, frozenset[str]] | None  # what calls give the forward of model or suffix
    head: FusedHead | None
    loss: Loss
    frozen: Frozen | None = None  # the calls of frozen modules that passes do without

    @classmethod
    def plain(cls, task: Task, probe: Probe, train: Samples) -> Arrangement:
        """The whole model, on the data as they came."""
        return cls(task.passes, probe, train, None, task.arguments, None, task.loss)

    def set(self, task: Task) -> None:
        """Have the task (not entered) run so."""
        task.arrange(
            passes=self.passes,
            loss=self.loss,
            suffix=self.suffix,
            head=self.head,
            arguments=self.arguments,
            rewritable=self.frozen is None,
        )

    def holding(self, change: Callable[[Samples], Samples]) -> Arrangement:
        """With all data held in another way; what is shared stays shared."""
        held = {id(samples): samples for samples in (self.train, *(part.samples for part in self.probe.parts))}
        held = {key: change(samples) for key, samples in held.items()}
        probe = self.probe.with_samples(lambda samples: held[id(samples)])
        return dataclasses.replace(self, probe=probe, train=held[id(self.train)])

    def without(self, name: str, plain: Arrangement) -> Arrangement:
        """Without one of the REWRITINGS."""
        if name == "frozen_prefix":
            if self.suffix is None and self.frozen is None:
                return self
            passes = dataclasses.replace(self.passes, frozen_prefix=False, fused_head=False)
            return dataclasses.replace(plain, passes=passes)
        if name == "fused_head":
            return dataclasses.replace(self, passes=dataclasses.replace(self.passes, fused_head=False), head=None)
        if name == "memory_format":
            return dataclasses.replace(self, passes=dataclasses.replace(self.passes, memory_format="contiguous"))
        changed: dict[str, Any] = {name: False}
        return dataclasses.replace(self, passes=dataclasses.replace(self.passes, **changed))

    def as_settled(self, passes: Passes, plain: Arrangement) -> Arrangement:
        """Without what these passes, settled elsewhere, do without."""
        arranged = self
        for name in REWRITINGS:
            if getattr(passes, name) != getattr(arranged.passes, name):
                arranged = arranged.without(name, plain)
        return dataclasses.replace(arranged, passes=passes)


def cut(
    task: Task, plain: Arrangement, head_backend: str, budget: Budget | None = None
) -> tuple[Arrangement, list[str]]:
    """With what lies before the first sampled weight run once, and the head taken off, where that can be; and why."""
    plain.set(task)
    suffix, change, reasons = cut_prefix(task, plain.probe, plain.train)
    arranged = plain
    if suffix is not None and change is not None:
        held = plain.holding(change)
        count = len(leaves(held.train.tree[0]))
        arranged = dataclasses.replace(held, suffix=suffix, arguments=(count, frozenset()))
    elif task.passes.frozen_prefix is True and reasons:
        arranged, reasons = _keeping(task, plain, reasons, budget)
    arranged.set(task)
    head, why = fuse_head(task, arranged.train, head_backend, arranged.frozen)
    passes = dataclasses.replace(arranged.passes, fused_head=head is not None)
    arranged = dataclasses.replace(arranged, head=head, passes=passes)
    arranged.set(task)
    return arranged, [*reasons, *why]


def _keeping(
    task: Task, plain: Arrangement, reasons: list[str], budget: Budget | None
) -> tuple[Arrangement, list[str]]:
    """With the outputs of frozen modules kept, where that can be; and why (not), after why the model is not cut."""
    every = {id(samples): samples for samples in (plain.train, *(part.samples for part in plain.probe.parts))}
    try:
        frozen, change, said = keep_outputs(task, plain.train, list(every.values()), budget)
        held = plain.holding(change)
    except NoCut as reason:
        return plain, [f"{'; '.join(reasons)}; {reason}"]
    arranged = dataclasses.replace(held, frozen=frozen, loss=frozen.loss(plain.loss))
    return arranged, [f"frozen prefix = cached: {said}"]


def settle(task: Task, arranged: Arrangement, plain: Arrangement, minibatch: int | None) -> tuple[Passes, list[str]]:
    """The passes, without the rewritings whose losses are not those of the user's own call; and why.

    Args:
        minibatch: samples of a gradient; None where no gradient is taken.

    Raises:
        Disagreement, or what model or loss raise: even without any rewriting.
    """
    trouble = _trouble(task, arranged, minibatch)
    if trouble is None:
        if arranged.passes.fold_norms and not task.folded:
            arranged = arranged.without("fold_norms", plain)
            return arranged.passes, ["fold_norms = not used: the model cannot be traced, or has no norm to fold"]
        return arranged.passes, []
    used = [name for name in REWRITINGS if arranged.without(name, plain) != arranged]
    if not task.channels_last:
        used = [name for name in used if name != "memory_format"]
    for name in used:
        candidate = arranged.without(name, plain)
        if _trouble(task, candidate, minibatch) is None:
            return candidate.passes, [_unused(name, trouble)]
    for name in used:
        arranged = arranged.without(name, plain)
    if not used or _trouble(task, arranged, minibatch) is not None:
        raise trouble
    return arranged.passes, [_unused(name, trouble) for name in used]


def _unused(name: str, trouble: Exception) -> str:
    return f"{name} = not used: {trouble}".splitlines()[0]


def _trouble(task: Task, arranged: Arrangement, minibatch: int | None) -> Exception | None:
    """Why the passes cannot be run so, if they cannot."""
    arranged.set(task)
    named: dict[str, Samples] = {part.name: part.samples for part in arranged.probe.parts}
    train: dict[str, Any] = {} if arranged.probe.holds(arranged.train) else {"train": arranged.train}
    try:
        with task:
            for name, samples in {**named, **train}.items():
                check_passes(task, samples, task.called[name], minibatch if samples is arranged.train else None)
    except Exception as error:  # whatever a rewritten model raises
        return error
    return None
