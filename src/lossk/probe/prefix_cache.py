"""Holding a run's data as activations at a cut of the model: decided, computed and accounted for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from lossk.available import gigabytes
from lossk.data.data import Samples
from lossk.device import free_bytes
from lossk.probe.probe import Probe
from lossk.task.prefix import Cut, NoCut, find_cut
from lossk.task.task import Task, fitting_batch

Change = Callable[[Samples], Samples]


def cut_prefix(task: Task, probe: Probe, train: Samples) -> tuple[nn.Module | None, Change | None, list[str]]:
    """(what to run instead of the model, how to turn data into what it reads, why); (None, None, ...) without a cut.

    Raises:
        ValueError: a module was named to cut at, and the model cannot be cut there.
    """
    asked = task.passes.frozen_prefix
    frozen = len(task.sampled) < len({id(p) for p in task.model.parameters()})
    if asked is False or (asked is True and not frozen):
        return None, None, []
    try:
        if train.tree is None or any(part.samples.tree is None for part in probe.parts):
            raise NoCut("data are streamed")
        if not task.loss.takes_outputs:
            raise NoCut("a loss of your own may read the inputs itself")
        with task:
            cut = find_cut(task.model, task.sampled, train, at=asked if isinstance(asked, str) else None)
            everything = {id(samples): samples for samples in (train, *(part.samples for part in probe.parts))}
            size = sum(_size(cut, samples) for samples in everything.values())
            limit = task.passes.prefix_bytes
            limit = free_bytes(task.device) // 4 if limit is None else limit
            if size > limit:
                raise NoCut(f"the activations need {gigabytes(size)}, and {gigabytes(limit)} are allowed")
    except NoCut as reason:
        if isinstance(asked, str):
            raise ValueError(f"frozen_prefix={asked!r}: {reason}") from reason
        return None, None, [f"frozen prefix = not cached: {reason}"]

    def change(samples: Samples) -> Samples:
        with task:
            return _activations(task, cut, samples)

    return cut.suffix, change, [f"frozen prefix = cached: {cut.how}; {gigabytes(size)} of activations"]


def _size(cut: Cut, samples: Samples) -> int:
    """Bytes of all activations."""
    with torch.no_grad():
        one = cut.activations(samples[:1][0])
    return len(samples) * sum(part.numel() * part.element_size() for part in one)


def _activations(task: Task, cut: Cut, samples: Samples) -> Samples:
    batch = fitting_batch(task.passes.probe_batch, task.loss.positions)
    out: tuple[torch.Tensor, ...] = ()
    for start, (inputs, _) in samples.batches(batch):
        with torch.no_grad(), task.autocast():
            parts = cut.activations(inputs)
        if not out:
            out = tuple(
                torch.empty(len(samples), *part.shape[1:], dtype=part.dtype, device=part.device) for part in parts
            )
        for whole, part in zip(out, parts, strict=True):
            whole[start : start + batch] = part
    return task.place(Samples((out, samples.tree[1]), len(samples), copied=False))
