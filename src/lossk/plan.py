"""What a run will cost, said before it starts and checked against what is free."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from lossk.data import Samples
from lossk.errors import StoreError
from lossk.layout import BYTES, Layout, Size, weight_bytes
from lossk.memory import Budget, gigabytes
from lossk.probe import Probe


@dataclass(frozen=True)
class Plan:
    """Estimates: seconds, and bytes of memory (`layout`), resident data and disk."""

    seconds: float
    layout: Layout
    data_bytes: int
    disk_bytes: int

    def __str__(self) -> str:
        disk = f", {gigabytes(self.disk_bytes)} on disk" if self.disk_bytes else ""
        return f"about {duration(self.seconds)}{disk}; {describe(self.layout)}; {gigabytes(self.data_bytes)} of data"


def describe(layout: Layout) -> str:
    """The memory of a run, in words."""
    parts = [
        f"{gigabytes(layout.tile_bytes)} {'traces' if layout.tiles == 'traces' else 'tiles'}",
        f"{gigabytes(layout.panel_bytes)} panel",
        f"{gigabytes(layout.weight_bytes)} weights",
        f"{gigabytes(layout.taken_bytes)} taken already",
    ]
    if layout.tiles == "store":
        held = f"{layout.super_panel} draws of {layout.stripes + 1} tile rows"
        parts.insert(1, f"{gigabytes(layout.rows_bytes)} for {held}")
    places = {"memory": "tiles in memory", "store": "tiles in the store", "traces": "traces in memory"}
    where = places.get(layout.tiles, "tiles on the device")
    return f"{where}, at most {gigabytes(layout.peak_bytes)} of memory ({', '.join(parts)})"


def make_plan(
    layout: Layout,
    size: Size,
    *,
    num_steps: int,
    probe: Probe,
    train: Samples,
    probe_seconds: float,
    step_seconds: float,
    update_rate: float,
    on_disk: bool,
) -> Plan:
    """Estimate a run from the measured cost of one probe pass, one step, and the machine's product rate.

    Args:
        num_steps: of one chain.
        update_rate: fused multiply-adds per second of a rank update.
    """
    sampling = size.num_chains * num_steps * step_seconds + size.draws * probe_seconds
    update = 0.0 if layout.tiles == "traces" else size.entries * size.draws / update_rate
    stored = 4 * size.draws * size.num_samples + BYTES[size.dtype] * size.entries + 16 * size.num_weights
    return Plan(
        seconds=sampling + update,
        layout=layout,
        data_bytes=probe.nbytes + (0 if probe.holds(train) else train.nbytes),
        disk_bytes=stored if on_disk else 0,
    )


def trace_layout(size: Size, budget: Budget, taken: int) -> Layout:
    """The traces themselves, held in memory.

    Raises:
        MemoryError: they do not fit; with the sizes and the number of samples that would.
    """
    panel = 4 * (size.panel + 1) * size.num_samples
    layout = Layout("traces", 4 * size.draws * size.num_samples, panel, weight_bytes(size), taken)
    limit = budget.limit(taken)
    if layout.peak_bytes > limit:
        per_sample = (layout.tile_bytes + layout.panel_bytes) / size.num_samples
        fitting = max(int(size.num_samples - (layout.peak_bytes - limit) / per_sample), 0)
        raise MemoryError(
            f"the traces of {size.num_samples} samples need {gigabytes(layout.peak_bytes)} and "
            f"{gigabytes(max(limit - taken, 0))} are free; about {fitting} samples would fit"
        )
    return layout


def check_disk(plan: Plan, path: Path) -> None:
    """Refuse a run whose store would not fit on its disk.

    Raises:
        StoreError: with the sizes.
    """
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if plan.disk_bytes > free:
        raise StoreError(
            f"out={str(path)!r} needs {gigabytes(plan.disk_bytes)} of disk and {gigabytes(free)} are free; "
            "dtype='float16' needs half as much for its tiles"
        )


def duration(seconds: float) -> str:
    """A time span for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
