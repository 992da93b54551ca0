"""What a run will cost, and where the tiles of each of its ranks will be: settled before it starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lossk import provenance
from lossk.memory import Budget
from lossk.plan.device_plan import Room, choose_overlap, choose_with_device, describe_room
from lossk.plan.device_room import measure_room
from lossk.plan.layout import Layout, Size, choose_layout
from lossk.plan.plan import check_disk, check_traces, factor_layout, make_plan, trace_layout
from lossk.ranks.mesh import Mesh
from lossk.run.run import Run
from lossk.timings import Progress

OF_SIZE = ("num_samples", "tile", "panel", "num_chains", "num_draws", "dtype")  # of what a request says


@dataclass(frozen=True, kw_only=True)
class Planned:
    """Where tiles are, and how the work is dealt."""

    layout: Layout
    mesh: Mesh
    overlap: bool | None = None  # whether the probe runs beside the chain's next steps; None: as the passes say
    reasons: tuple[str, ...] = ()

    def told(self) -> dict[str, Any]:
        """As plain data, for other ranks."""
        return {**vars(self), "layout": self.layout.told(), "mesh": dataclasses.asdict(self.mesh)}

    @classmethod
    def heard(cls, plain: Mapping[str, Any]) -> Planned:
        """The inverse of `told`."""
        return cls(
            layout=Layout.heard(plain["layout"]),
            mesh=Mesh(**plain["mesh"]),
            overlap=plain["overlap"],
            reasons=tuple(plain["reasons"]),
        )


def plan(
    run: Run, request: Mapping[str, Any], mesh: Mesh, budget: Budget, bar: Progress, step_seconds: float,
    path: Path | None, saved: Mapping[str, Any] | None,
) -> Planned:  # fmt: skip
    """Say what the run will cost, and where its tiles will be; refuse what cannot fit.

    Args:
        budget: of a rank.
        step_seconds: of one step of a chain.
        saved: `Layout.to_dict` of the run that is resumed.

    Raises:
        MemoryError: a rank needs more than its budget.
        StoreError: the store needs more than its disk has.
    """
    taken = budget.taken()
    working = run.working(budget, taken, piloted=saved is None)
    size = Size(
        **{name: request[name] for name in OF_SIZE},
        num_weights=run.task.num_weights,
        stack_bytes=run.task.stack_bytes(request["panel"]),
        pass_bytes=working.run,
        mesh=mesh,
    )
    cuda = run.task.device.type == "cuda" and mesh.ranks == 1  # what is left of the devices of ranks is not asked
    room = measure_room(run.task, run.probe.parts[0].samples, run.train) if cuda else None
    layout = _choose(size, request["form"], budget, taken, room, bar, on_disk=path is not None, saved=saved)
    overlap: bool | None = None
    reasons: tuple[str, ...] = ()
    if room is not None:
        overlap, layout, why = choose_overlap(run.task.passes, size, layout, room)
        reasons = (why,)
        bar.say(f"device: {why}")
    layout = dataclasses.replace(layout, reached_bytes=working.pilot)
    cost = make_plan(
        layout,
        size,
        num_steps=run.sampler.steps(run.num_draws),
        probe=run.probe,
        train=run.train,
        probe_seconds=run.pass_seconds * run.probe.num_samples,
        step_seconds=step_seconds,
        update_rate=provenance.multiply_add_rate(),
        on_disk=path is not None,
    )
    bar.say(str(cost))
    if path is not None and not path.exists():
        check_disk(cost, path)
    return Planned(layout=layout, mesh=mesh, overlap=overlap, reasons=reasons)


def _choose(
    size: Size, form: str | None, budget: Budget, taken: int, room: Room | None, bar: Progress, *, on_disk: bool,
    saved: Mapping[str, Any] | None,
) -> Layout:  # fmt: skip
    """Where the tiles are, or what there is instead of them."""
    if form is not None:
        held = form == "traces"
        layout = trace_layout(size, taken) if held else factor_layout(size, taken, on_disk=on_disk)
        check_traces(layout, size, budget.limit(taken))
        return layout
    if room is None:
        return choose_layout(size, budget, taken, on_disk=on_disk, saved=saved)
    layout = choose_with_device(size, room, budget, taken, on_disk=on_disk, saved=saved)
    bar.say(describe_room(layout, room))
    return layout
