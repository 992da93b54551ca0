"""What a run will cost, said before it starts and checked against what is free."""

from __future__ import annotations

from dataclasses import dataclass

import psutil

from lossk.data import Samples
from lossk.probe import Probe
from lossk.task import Task

BYTES = {"float32": 4, "float16": 2}


@dataclass(frozen=True)
class Plan:
    """Estimates: seconds, and bytes of memory beyond what the process already holds."""

    seconds: float
    tile_bytes: int
    panel_bytes: int
    weight_bytes: int
    data_bytes: int
    disk_bytes: int

    @property
    def memory_bytes(self) -> int:
        return self.tile_bytes + self.panel_bytes + self.weight_bytes

    def __str__(self) -> str:
        disk = f", {gigabytes(self.disk_bytes)} on disk" if self.disk_bytes else ""
        return (
            f"about {duration(self.seconds)}; {gigabytes(self.memory_bytes)} of memory "
            f"({gigabytes(self.tile_bytes)} tiles, {gigabytes(self.panel_bytes)} panel, "
            f"{gigabytes(self.weight_bytes)} weights) beside {gigabytes(self.data_bytes)} of data{disk}"
        )


def make_plan(
    *,
    num_samples: int,
    tile: int,
    panel: int,
    dtype: str,
    num_chains: int,
    num_draws: int,
    num_steps: int,
    task: Task,
    probe: Probe,
    train: Samples,
    probe_seconds: float,
    step_seconds: float,
    update_rate: float,
    on_disk: bool,
    held_traces: bool = False,
) -> Plan:
    """Estimate a run from the measured cost of one probe pass, one step, and the machine's product rate.

    Args:
        num_steps: of one chain.
        update_rate: fused multiply-adds per second of a rank update.
        held_traces: traces are kept in memory instead of tiles.
    """
    draws = num_chains * num_draws
    side = -(-num_samples // tile)
    entries = (num_samples * num_samples + num_samples * min(tile, num_samples)) // 2 if side > 1 else num_samples**2
    sampling = num_chains * num_steps * step_seconds + draws * probe_seconds
    update = 0.0 if held_traces else entries * draws / update_rate
    traces = 4 * draws * num_samples
    data = probe.nbytes + (0 if probe.holds(train) else train.nbytes)
    return Plan(
        seconds=sampling + update,
        tile_bytes=traces if held_traces else 4 * entries,
        panel_bytes=8 * (panel + 1) * num_samples + 24 * (panel + 1) * min(num_samples, 4096),
        weight_bytes=4 * 4 * task.num_weights,
        data_bytes=data,
        disk_bytes=traces + BYTES[dtype] * entries + 16 * task.num_weights if on_disk else 0,
    )


def check_memory(plan: Plan, *, num_samples: int, what: str) -> None:
    """Refuse a run that cannot fit.

    Raises:
        MemoryError: with the sizes and the largest number of samples that would fit.
    """
    free = psutil.virtual_memory().available
    if plan.memory_bytes <= 0.95 * free:
        return
    spare = max(0.95 * free - plan.weight_bytes, 0.0)
    fitting = int(num_samples * (spare / max(plan.tile_bytes + plan.panel_bytes, 1)) ** 0.5)
    raise MemoryError(
        f"{what} of {num_samples} samples needs {gigabytes(plan.memory_bytes)} and {gigabytes(free)} are free; "
        f"about {fitting} samples would fit (or, for few draws, lossk.sample_losses and LossKernel.from_traces)"
    )


def gigabytes(count: float) -> str:
    """A byte count for people."""
    if count < 1e6:
        return f"{count / 1e3:.0f} kB"
    return f"{count / 1e6:.0f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"


def duration(seconds: float) -> str:
    """A time span for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
