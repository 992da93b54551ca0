"""What a rank of a distributed run holds, where its tiles are, and what the run will cost: settled before it starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lossk import provenance
from lossk.available import gigabytes
from lossk.forms.blocks import tile_spans
from lossk.memory import Budget, as_setting
from lossk.plan.layout import BYTES, Layout, Size, in_memory, panel_bytes, widest_in_store
from lossk.plan.plan import (
    Plan,
    check_disk,
    check_traces,
    describe,
    factor_layout,
    has_tiles,
    stored_bytes,
    trace_layout,
)
from lossk.ranks.mesh import Mesh, deal_tiles, tile_shapes
from lossk.run.run import Run
from lossk.timings import Progress, duration

OPEN_CHAIN = 72  # bytes a sample of the statistics of a chain that is not finished


def size_of(request: Mapping[str, Any], num_weights: int, **more: Any) -> Size:
    names = ("num_samples", "tile", "panel", "num_chains", "num_draws", "dtype")
    return Size(**{name: request[name] for name in names}, num_weights=num_weights, **more)


def plan_share(
    run: Run, request: dict[str, Any], mesh: Mesh, budget: Budget, bar: Progress, step_seconds: float,
    path: Path | None, saved: Mapping[str, Any] | None,
) -> Layout:  # fmt: skip
    """Say what the run will cost, and where its tiles will be; refuse what cannot fit.

    Args:
        budget: of a rank.
        step_seconds: of one step of a chain.
        saved: `Layout.to_dict` of the run that is resumed.

    Raises:
        MemoryError: the largest share needs more than a rank may use; with what would fit.
        StoreError: the store needs more than its disk has.
    """
    taken = budget.taken()
    working, limit = run.working(budget, taken, piloted=saved is None), budget.limit(taken)
    stack = run.task.stack_bytes(request["panel"])
    size = size_of(request, run.task.num_weights, stack_bytes=stack, pass_bytes=working.run)
    if request["form"] is None:
        layout = choose_share(size, mesh, taken, limit, path is not None, saved)
    else:
        layout = traces_share(size, mesh, taken, request["form"], path is not None)
        check_traces(layout, size, limit)
    layout = dataclasses.replace(layout, reached_bytes=working.pilot)
    needed = peak_of(layout, request, path is None)
    if needed > limit:
        raise MemoryError(
            f"a rank of {mesh.ranks} needs {gigabytes(needed)} for the kernel of {size.num_samples} samples, and "
            f"{gigabytes(limit)} are left for it; more ranks on more machines would need less, "
            f"{'' if path is not None else 'out=PATH would too, '}"
            f"or pass memory={as_setting(needed)!r} if that was the limit"
        )
    probe_seconds = run.pass_seconds * run.probe.num_samples
    per_chain = run.sampler.steps(size.num_draws) * step_seconds + size.num_draws * probe_seconds / mesh.shards
    rounds = -(-size.num_chains // mesh.rows)
    products = size.entries * size.draws if has_tiles(layout) else 0
    update = products / provenance.multiply_add_rate() / mesh.ranks
    stored = stored_bytes(size, layout) + 16 * mesh.rows * size.num_weights
    data = run.probe.nbytes + (0 if run.probe.holds(run.train) else run.train.nbytes)
    plan = Plan(rounds * per_chain + update, layout, data, stored if path is not None else 0)
    disk = f", {gigabytes(plan.disk_bytes)} on disk" if plan.disk_bytes else ""
    bar.say(f"mesh: {mesh}; cost: about {duration(plan.seconds)}{disk}; each rank: {describe(layout)}")
    if path is not None and not path.exists():
        check_disk(plan, path)
    return layout


def choose_share(
    size: Size, mesh: Mesh, taken: int, limit: int, on_disk: bool, saved: Mapping[str, Any] | None
) -> Layout:
    """Tiles in memory, each rank's own, if they fit; else in the store if there is one."""
    beside = travelling_bytes(size, mesh)
    memory = in_memory(size, taken, on_disk=on_disk)
    share = largest_share(size, mesh.ranks)
    writing = memory.tile_bytes - 4 * size.entries
    memory = dataclasses.replace(memory, tile_bytes=4 * share + writing, panel_bytes=panel_bytes(size) + beside)
    where, super_panel = (None, None) if saved is None else (saved["tiles"], saved["super_panel"] or None)
    if where == "memory" or not on_disk or (where is None and memory.peak_bytes <= limit):
        return memory
    store = widest_in_store(size, taken + beside, limit, super_panel)
    return dataclasses.replace(store, panel_bytes=store.panel_bytes + beside, taken_bytes=taken)


def traces_share(size: Size, mesh: Mesh, taken: int, form: str, on_disk: bool) -> Layout:
    """Traces, or the factor: every rank holds all of them or, in the store, what one process would."""
    layout = trace_layout(size, taken) if form == "traces" else factor_layout(size, taken, on_disk=on_disk)
    return dataclasses.replace(layout, panel_bytes=layout.panel_bytes + travelling_bytes(size, mesh))


def travelling_bytes(size: Size, mesh: Mesh) -> int:
    """Panels on their way between ranks, and the statistics of the chains that are stepped side by side."""
    widest = -(-size.num_samples // mesh.shards) + 1024
    panels = 4 * size.panel * (widest + 8) * (mesh.ranks + 2) + 4 * size.panel * size.num_samples * mesh.rows
    return panels + OPEN_CHAIN * size.num_samples * mesh.rows


def largest_share(size: Size, ranks: int) -> int:
    """Entries of the tiles of the rank that has most."""
    shapes = tile_shapes(tile_spans(size.num_samples, size.side))
    return max(sum(shapes[key][0] * shapes[key][1] for key in keys) for keys in deal_tiles(shapes, ranks))


def peak_of(layout: Layout, request: Mapping[str, Any], gathering: bool) -> int:
    """The expected peak of a rank; of the one that all tiles are gathered on, with them."""
    if not (gathering and has_tiles(layout)):
        return layout.peak_bytes
    every = in_memory(size_of(request, 0), 0, on_disk=False).tile_bytes
    return layout.peak_bytes + every * BYTES[request["dtype"]] // 4
