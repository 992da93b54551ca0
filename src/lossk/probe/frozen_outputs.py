"""Holding what frozen modules give for a run's data: how much it is, where it lies, and how it is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lossk.available import gigabytes
from lossk.data.data import Along, Samples
from lossk.data.spool import Spool, folders
from lossk.device import free_bytes
from lossk.memory import Budget
from lossk.task.frozen import Frozen
from lossk.task.frozen_calls import find_frozen
from lossk.task.parameters import is_compiled
from lossk.task.prefix import NoCut
from lossk.task.task import Task, fitting_batch

SHARE = 4  # of free memory, a quarter


def keep_outputs(
    task: Task, train: Samples, every: Sequence[Samples], budget: Budget | None
) -> tuple[Frozen, Callable[[Samples], Samples], str]:
    """The calls of frozen modules that passes do without, how data get what these give along, and what is said of it.

    Args:
        train: a few samples of it show the calls.
        every: all data of the run.
        budget: of the call; None is what is free.

    Raises:
        NoCut: there are no such calls, or what they give is too much.
    """
    if any(samples.tree is None for samples in every):
        raise NoCut("what they give is kept by sample")
    if task.passes.compile:
        raise NoCut("the passes are compiled")
    if is_compiled(task.model):
        raise NoCut("the model is compiled")
    with task:
        try:
            frozen = find_frozen(task, train)
        except NoCut:
            raise
        except Exception as error:  # whatever a stranger's model makes of being watched
            raise NoCut(f"{type(error).__name__}: {error}".splitlines()[0]) from error
        each = sum(rows[0].numel() * rows.element_size() for rows in _kept(task, frozen, train[:2]))
    size = each * sum(len(samples) for samples in every)
    limit = _free(task, budget) // SHARE if task.passes.prefix_bytes is None else task.passes.prefix_bytes
    spool = None
    if size > limit:
        spool = Spool(*folders(None))
        if task.passes.prefix_bytes is not None or task.device.type != "cpu" or size > spool.free:
            raise NoCut(f"the outputs of frozen modules need {gigabytes(size)}, and {gigabytes(limit)} are allowed")
    where = "" if spool is None else f", in mapped files in {spool.folder}"
    said = f"{_listed(frozen)}; {gigabytes(size)} of outputs{where}"
    return frozen, lambda samples: _held(task, frozen, samples, spool), said


def _listed(frozen: Frozen) -> str:
    """The calls of modules with weights, for people."""
    names = [call.name for call in frozen.calls.values() if any(True for _ in call.module.parameters())]
    if len(names) == 1:
        return f"1 call of frozen modules run once ({names[0]})"
    return f"{len(names)} calls of frozen modules run once ({names[0]} to {names[-1]})"


def _free(task: Task, budget: Budget | None) -> int:
    if budget is None or task.device.type != "cpu":
        return free_bytes(task.device)
    taken = budget.taken()
    return max(budget.limit(taken) - taken, 0)


def _kept(task: Task, frozen: Frozen, batch: object) -> tuple[Tensor, ...]:
    with torch.no_grad(), task.autocast():
        return frozen.of(lambda: task.loss.evaluate(task.network, batch))


def _held(task: Task, frozen: Frozen, samples: Samples, spool: Spool | None) -> Samples:
    """The samples with what the frozen modules give for each, made in the probe's own batches."""
    batch = fitting_batch(task.passes.probe_batch, task.loss.positions)
    out: tuple[Tensor, ...] = ()
    with task:
        for start, part in samples.batches(batch):
            kept = _kept(task, frozen, part)
            out = out or tuple(_room(rows, len(samples), spool) for rows in kept)
            for whole, rows in zip(out, kept, strict=True):
                whole[start : start + len(rows)] = rows
                if spool is not None:
                    spool.touched(rows.nbytes)
    along = Samples(out, len(samples), copied=False, spool=spool)
    return dataclasses.replace(samples, along=Along(along, frozen.tell))


def _room(rows: Tensor, count: int, spool: Spool | None) -> Tensor:
    """An empty tensor [count, ...] whose samples lie in memory as those of `rows` do."""
    strides = rows.stride()
    order = sorted(range(1, rows.ndim), key=lambda dim: -strides[dim])
    shape = (count, *(rows.shape[dim] for dim in order))
    empty = (
        torch.empty(shape, dtype=rows.dtype, device=rows.device) if spool is None else spool.empty(shape, rows.dtype)
    )
    return empty.permute(0, *(1 + order.index(dim) for dim in range(1, rows.ndim)))
