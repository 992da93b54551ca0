"""A run, up to what is made of its panels: rank 0 decides, each rank samples its share, all get all panels.

A round of the loop is one panel of each row of the mesh. A process alone is a world of one rank, and a round its next
panel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lossk.accumulate.exchange import Received, Turn, exchanged
from lossk.accumulate.panel import Panel, choose_panel
from lossk.accumulate.runlog import RunLog
from lossk.available import gigabytes
from lossk.errors import DivergedError
from lossk.forms.blocks import tile_spans
from lossk.forms.names import Names
from lossk.memory import Budget
from lossk.plan.layout import TILES_IN_MEMORY, Layout
from lossk.probe.shards import ProbeShard, cut_probe
from lossk.ranks.mesh import Item, Mesh, choose_mesh, deal_chains, deal_tiles, schedule, tile_shapes
from lossk.ranks.world import World
from lossk.run import record
from lossk.run.cost import Planned, plan
from lossk.run.prepare import Prepared, arrange, take_turns
from lossk.run.run import Run, announce, resolve
from lossk.samplers.chain import ChainState
from lossk.task.passes import Passes
from lossk.timings import Progress

Key = tuple[int, int]


@dataclass(frozen=True)
class Work:
    """What one rank of a run works with."""

    world: World
    run: Run
    request: dict[str, Any]
    planned: Planned
    budget: Budget
    bar: Progress
    log: RunLog | None
    names: Names = field(default_factory=Names)  # of the rows

    @property
    def layout(self) -> Layout:
        """Where the tiles are."""
        return self.planned.layout

    @property
    def mesh(self) -> Mesh:
        """Of the ranks."""
        return self.planned.mesh

    @property
    def side(self) -> int:
        """Of a tile, in samples."""
        return min(self.request["tile"], self.request["num_samples"])

    @property
    def shapes(self) -> dict[Key, tuple[int, int]]:
        """Of all tiles."""
        return tile_shapes(tile_spans(self.request["num_samples"], self.side))

    @property
    def owners(self) -> list[list[Key]]:
        """The tiles of each rank."""
        return deal_tiles(self.shapes, self.world.size)


def usual_panel(world: World, run: Prepared, budget: Budget) -> int:
    """Draws per panel, where nobody has said: those of all chains that are stepped at a time fit where one's would."""
    at_a_time = min(world.size, run.num_chains)
    return max(1, choose_panel(len(run.probe), run.num_draws, budget.asked) // at_a_time)


@contextmanager
def chosen_by_first(
    world: World, prepared: Prepared, request: dict[str, Any], passes: Passes | None, path: Path | None,
    log: RunLog | None, budget: Budget, bar: Progress,
) -> Iterator[tuple[Run, Planned]]:  # fmt: skip
    """The run as rank 0 chooses it, and its plan, on every rank, with the task entered.

    Passes over all training samples that go before are shared by the ranks; what they cannot share (placing and cutting
    data, the fit of a Gaussian) all do at the same time; only for the pilots, and for the plan, do the others wait.

    Args:
        log: on rank 0, of the run that is resumed.
    """
    before, budget = None if log is None else log.chosen, dataclasses.replace(budget, sharing=world.local_size)
    chosen = world.decide(lambda: None if before is None else {"passes": before["passes"]})
    prepared = arrange(prepared, passes, chosen, world, budget)
    with prepared.task:
        run = resolve(prepared, before, bar, world)
        if world.size > 1:
            take_turns(run.task)  # what a device has left is not asked here

        def settled() -> dict[str, Any]:
            announce(run, bar)
            with run.timings.measure("plan"):
                step = run.time_a_step()
                mesh = _mesh(run, world, log, step)
                saved = None if before is None else before.get("layout", TILES_IN_MEMORY)
                return plan(run, request, mesh, budget, bar, step, path, saved).told()

        planned = Planned.heard(world.decide(settled))
        budget.plan(planned.layout.peak_bytes)
        world.together(lambda: None if world.first else _check_share(planned.layout, budget))
        if planned.overlap is not None:
            run.task.set_overlap(planned.overlap)
        yield dataclasses.replace(run, passes_reasons=(*run.passes_reasons, *planned.reasons)), planned


def chosen_by(run: Run, planned: Planned) -> dict[str, Any]:
    """What a resumed run must not choose anew."""
    dealt = {"mesh": dataclasses.asdict(planned.mesh)} if planned.mesh.ranks > 1 else {}
    return {**run.choices.to_dict(), "layout": planned.layout.to_dict(), **dealt}


def _mesh(run: Run, world: World, log: RunLog | None, step_seconds: float) -> Mesh:
    """The mesh of the run that is resumed, if it had as many ranks; else the quickest."""
    saved = None if log is None or log.chosen is None else log.chosen.get("mesh")
    if saved is not None and Mesh(**saved).ranks == world.size:
        return Mesh(**saved)
    steps_per_draw = run.sampler.steps(run.num_draws) / run.num_draws
    return choose_mesh(
        world.size,
        [run.num_draws - made for made in _made(run, log).values()],
        steps_per_draw * step_seconds,
        run.pass_seconds * run.probe.num_samples,
    )


def _check_share(layout: Layout, budget: Budget) -> None:
    """Refuse a share, planned by rank 0, that this rank, which gathers no tiles, cannot hold."""
    own = dataclasses.replace(layout, gathered_bytes=0)
    needed, taken = own.peak_bytes - own.taken_bytes, budget.taken()
    limit = budget.limit(taken) - taken
    if needed > limit:
        raise MemoryError(
            f"needs {gigabytes(needed)} more for its share of the kernel, and {gigabytes(limit)} are left for it"
        )


def _made(run: Run, log: RunLog | None) -> dict[int, int]:
    """The chains that have not all their draws, and how many they have."""
    return dict.fromkeys(range(run.num_chains), 0) if log is None else log.unfinished()


def rounds(work: Work) -> Iterator[tuple[list[Received], Panel | None]]:
    """Round by round until all draws are made: a panel of each row that has one, and this rank's own as it was sent.

    Raises:
        DivergedError: a chain diverged, on whatever rank: on all of them, after the same round.
    """
    log, run, panel = work.log, work.run, work.request["panel"]
    made = _made(run, log)
    dealt = deal_chains(sorted(made), work.mesh)
    row, shard = work.mesh.place(work.world.rank)
    probes = cut_probe(run.probe, run.task.passes.probe_batch, work.mesh.shards)
    starts = {chain: None if log is None else log.state_of(chain) for chain in dealt[row]}
    per_chain = run.sampler.steps(run.num_draws)
    ahead = sum(per_chain - (0 if start is None else start.step) for start in starts.values())
    total = -(-run.num_chains // work.mesh.rows) * per_chain
    work.bar.start(total, max(total - ahead, 0))
    turns = _turns(work, schedule(dealt, made, panel, run.num_draws), starts, probes[shard])
    yield from exchanged(work.world, work.mesh, [probe.rows for probe in probes], panel, turns)


def _turns(
    work: Work, steps: list[list[Item]], starts: Mapping[int, ChainState | None], probe: ProbeShard
) -> Iterator[Turn]:
    """What every row works on in each round, and this rank's panel, or why it has none."""
    row, _ = work.mesh.place(work.world.rank)
    own = (
        part
        for chain, start in starts.items()
        for part in work.run.chain_panels(chain, probe, work.request["panel"], work.bar, start)
    )
    error: DivergedError | None = None
    for number in range(max(map(len, steps))):
        items = [items[number] if number < len(items) else None for items in steps]
        part = None
        if items[row] is not None and error is None:
            try:
                part = next(own)
            except DivergedError as diverged:  # the others are to hear of it in their turn
                error = diverged
        yield Turn(items, part, error)


def meta(work: Work) -> dict[str, Any]:
    """What is kept beside the numbers."""
    dealt = {"ranks": {"size": work.world.size, **dataclasses.asdict(work.mesh)}} if work.world.size > 1 else {}
    return {
        **record.meta(work.run, work.request),
        "memory": {**work.layout.to_dict(), "planned_peak_bytes": work.layout.peak_bytes},
        **dealt,
    }
