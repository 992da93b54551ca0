"""The losses of the training samples at w*, by one process or shared by the ranks of a run, to the same bits."""

from __future__ import annotations

import torch
from torch import Tensor

from lossk.data.data import Samples
from lossk.probe.probe import first_non_finite, probe_losses
from lossk.ranks.mesh import deal_batches
from lossk.ranks.world import ALONE, World
from lossk.task.task import Task, fitting_batch
from lossk.timings import Timings


def evaluate_anchor(task: Task, train: Samples, timings: Timings, world: World = ALONE) -> tuple[Tensor, float]:
    """The losses, [n] float64, nats, and this process's seconds for each that it evaluated.

    Args:
        task: entered, at w*.
        world: each rank evaluates a run of whole batches, the very ones of a process alone, and gets all losses.

    Raises:
        ValueError: a loss that is not finite; on every rank.
    """
    batch = fitting_batch(task.passes.probe_batch, task.loss.positions)
    spans = deal_batches(len(train), batch, world.size)
    own = spans[world.rank]
    out, before = torch.empty(len(train), dtype=torch.float32, device="cpu"), timings.seconds["anchor"]
    with timings.measure("anchor"):
        probe_losses(task, train.cut(own) if world.size > 1 else train, out[own])
    each = (timings.seconds["anchor"] - before) / max(own.stop - own.start, 1)
    world.exchange_spans(out, spans)
    bad = first_non_finite(out)
    if bad is not None:
        raise ValueError(f"loss must be finite at the trained weights; training sample {bad} has {float(out[bad])}")
    return out.double(), each
