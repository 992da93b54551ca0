"""What a run will cost, said before it starts and checked against what is free."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from lossk.available import gigabytes
from lossk.data.data import Samples
from lossk.errors import StoreError
from lossk.forms.centering import BLOCK
from lossk.forms.watched import WATCHED, watched_bytes
from lossk.kernel.trace_factor import making_bytes
from lossk.plan.layout import BYTES, STRIPE, Layout, Size, log_columns, panel_bytes, weight_bytes
from lossk.plan.places import FACTOR, STORE, TRACES
from lossk.probe.probe import Probe
from lossk.ranks.mesh import ONE_RANK, Mesh
from lossk.timings import duration


@dataclass(frozen=True)
class Plan:
    """Estimates: seconds, and bytes of memory (`layout`), resident data and disk."""

    seconds: float
    layout: Layout
    data_bytes: int
    disk_bytes: int
    mesh: Mesh = ONE_RANK

    def __str__(self) -> str:
        disk = f", {gigabytes(self.disk_bytes)} on disk" if self.disk_bytes else ""
        each = f"{describe(self.layout)}; {gigabytes(self.data_bytes)} of data"
        if self.mesh.ranks == 1:
            return f"cost: about {duration(self.seconds)}{disk}; {each}"
        return f"mesh: {self.mesh}; cost: about {duration(self.seconds)}{disk}; each rank: {each}"


def describe(layout: Layout) -> str:
    """The memory of a run, in words."""
    parts = [
        f"{gigabytes(layout.tile_bytes)} {layout.place.makes}",
        f"{gigabytes(layout.panel_bytes)} panel",
        f"{gigabytes(layout.weight_bytes)} weights and a pass",
        f"{gigabytes(layout.taken_bytes)} taken already",
    ]
    if layout.place == STORE:
        held = f"{layout.super_panel} draws of {layout.stripes + 1} tile rows"
        parts.insert(1, f"{gigabytes(layout.rows_bytes)} for {held}")
    return f"{layout.place}, at most {gigabytes(layout.peak_bytes)} of memory ({', '.join(parts)})"


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
    mesh, chains_each = size.mesh, -(-size.num_chains // size.mesh.rows)
    sampling = chains_each * (num_steps * step_seconds + size.num_draws * probe_seconds / mesh.shards)
    update = size.entries * size.draws / update_rate / mesh.ranks if layout.place.has_tiles else 0.0
    stored = stored_bytes(size, layout) + 16 * mesh.rows * size.num_weights
    return Plan(
        seconds=sampling + update,
        layout=layout,
        data_bytes=probe.nbytes + (0 if probe.holds(train) else train.nbytes),
        disk_bytes=stored if on_disk else 0,
        mesh=mesh,
    )


def stored_bytes(size: Size, layout: Layout) -> int:
    """Of a store: the log of draws, what is made of them, and the watched traces beside tiles."""
    made = size.entries if layout.place.has_tiles else size.draws * size.num_samples
    kept = watched_bytes(size.num_samples, size.draws) if layout.place.has_tiles else 0
    return 4 * size.draws * size.num_samples + BYTES[size.dtype] * made + kept


def trace_layout(size: Size, taken: int) -> Layout:
    """The traces themselves, held in memory, where a cross kernel makes its factor of them."""
    making = making_bytes(size.num_samples, size.num_chains, size.num_draws)
    # Traces that the diagnostics watch, and losses that they average in float64.
    kept = 7 * watched_bytes(size.num_samples, size.draws) + 8 * max(BLOCK, size.num_samples)
    few = min(size.num_samples, WATCHED)
    kept += 36 * few * few + 216 * min(few, 128) * few  # of chance: nulls in float32, those of a law in float64
    panel = max(4 * (size.panel + 1) * size.num_samples, making) + kept + size.travelling_bytes
    return Layout(TRACES, 4 * size.draws * size.num_samples, panel, weight_bytes(size), taken)


def factor_layout(size: Size, taken: int, *, on_disk: bool) -> Layout:
    """The factor held in memory, in the place of the traces; or made in the store, a chunk at a time."""
    running = panel_bytes(size)
    if on_disk:
        chunk = 20 * size.draws * size.side  # losses, deviations of a chain in float64, scaled, cast, encoded
        reading = 36 * size.panel * log_columns(size.num_samples, size.tile)
        return Layout(FACTOR, chunk, running, weight_bytes(size), taken, rows_bytes=reading)
    each = 4 if size.dtype == "float32" else 6
    stripe = 16 * size.draws * min(size.num_samples, STRIPE)
    return Layout(TRACES, each * size.draws * size.num_samples + stripe, running, weight_bytes(size), taken)


def check_traces(layout: Layout, size: Size, limit: int) -> None:
    """Refuse traces, or a factor, that need more memory than there is.

    Raises:
        MemoryError: with the sizes and the number of samples that would fit.
    """
    if layout.peak_bytes > limit:
        per_sample = (layout.tile_bytes + layout.panel_bytes) / size.num_samples
        fitting = max(int(size.num_samples - (layout.peak_bytes - limit) / per_sample), 0)
        raise MemoryError(
            f"the {layout.place.makes} of {size.num_samples} samples need {gigabytes(layout.peak_bytes)} and "
            f"{gigabytes(max(limit - layout.taken_bytes, 0))} are free; about {fitting} samples would fit"
        )


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
