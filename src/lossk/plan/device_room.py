"""A run's memory on a CUDA device, measured, for `lossk.plan.device_plan` to decide from. Never run on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lossk.available import gigabytes
from lossk.data.data import Samples
from lossk.data.stream import Stream
from lossk.device import free_bytes, peak_bytes, repeats
from lossk.plan.device_plan import Room, data_fits
from lossk.task.task import Task
from lossk.timings import duration


def place_data(task: Task, every: Sequence[Samples]) -> list[str]:
    """Settle whether data are resident on the task's device or streamed to it (`task.streams`), and say so."""
    once = {id(each): each for each in every}.values()
    if task.device.type != "cuda":
        streamed = [_describe_streamed(each) for each in once if isinstance(each, Stream)]
        return [*_describe_spooled([each for each in once if each.spool is not None]), *streamed]
    size = sum(samples.nbytes for samples in once)
    task.streams = not data_fits(free_bytes(task.device), size, task.num_weights)
    where = "in pinned host memory, streamed" if task.streams else "resident on the device"
    how = repeats(task.device)
    why = "as torch.use_deterministic_algorithms has it" if how == "bitwise" else "gradients add up in any order here"
    return [f"data = {where}: {gigabytes(size)} in their own dtypes", f"repeats = {how}: {why}"]


def _describe_spooled(every: Sequence[Samples]) -> list[str]:
    """Which data lie in files, and where, as a reason."""
    size, folders = sum(each.nbytes for each in every), sorted({str(each.spool.folder) for each in every if each.spool})
    return [f"data = in mapped files: {gigabytes(size)} in their own dtypes, in {', '.join(folders)}"] if every else []


def _describe_streamed(each: Stream) -> str:
    """How data are read at every pass, as a reason."""
    workers = each.loader.num_workers
    by = f"by {workers} workers" if workers else "in this process"
    return f"data = streamed: {len(each)} samples are read at every pass {by}, which took {duration(each.seconds)}"


def measure_room(task: Task, probe: Samples, train: Samples) -> Room:
    """What is free, and what a batch of the probe and a minibatch take at their peak."""
    few = probe[: min(task.passes.probe_batch, len(probe))]
    index = torch.arange(min(task.passes.gradient_batch, len(train)), device="cpu")
    probing = peak_bytes(task.device, lambda: task.rows(few))
    stepping = peak_bytes(task.device, lambda: task.gradient(train, index))
    return Room(free_bytes(task.device), max(probing, stepping), min(probing, stepping))
