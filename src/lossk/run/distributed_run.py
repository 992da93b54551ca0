"""A run on many ranks, up to what is made of its panels: rank 0 decides, every rank samples its share, all get all.

A round of the loop is one panel of each row of the mesh. While the panels of one round are on their way the next ones
are computed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lossk.accumulate.exchange import Exchange, Received
from lossk.accumulate.panel import Panel, choose_panel
from lossk.accumulate.runlog import RunLog
from lossk.available import gigabytes
from lossk.errors import DivergedError
from lossk.forms.blocks import tile_spans
from lossk.memory import Budget
from lossk.plan.layout import Layout
from lossk.probe.shards import cut_probe
from lossk.ranks.distributed import Ranks
from lossk.ranks.mesh import Mesh, choose_mesh, deal_chains, deal_tiles, schedule, tile_shapes
from lossk.run import record
from lossk.run.distributed_plan import peak_of, plan_share
from lossk.run.run import Run
from lossk.task.passes import Passes
from lossk.timings import Progress

Key = tuple[int, int]


@dataclass(frozen=True)
class Work:
    """What one rank of a run works with."""

    ranks: Ranks
    run: Run
    request: dict[str, Any]
    layout: Layout
    mesh: Mesh
    budget: Budget
    bar: Progress
    log: RunLog | None

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
        return deal_tiles(self.shapes, self.ranks.size)


def start_clock(ranks: Ranks, run: Run) -> None:
    """Count what this rank waits for others among the run's stages, and its time from the call on."""
    ranks.timings = run.timings
    run.timings.seconds["start"] = ranks.start_seconds
    run.started = ranks.called


def usual_panel(ranks: Ranks, run: Run, budget: Budget) -> int:
    """Draws per panel, where nobody has said: those of all chains that are stepped at a time fit where one's would."""
    at_a_time = min(ranks.size, run.num_chains)
    return max(1, choose_panel(len(run.probe), run.num_draws, budget.asked) // at_a_time)


@contextmanager
def chosen_by_first(
    ranks: Ranks, run: Run, request: dict[str, Any], passes: Passes | None, path: Path | None, log: RunLog | None,
    budget: Budget, bar: Progress,
) -> Iterator[tuple[dict[str, Any], Layout]]:  # fmt: skip
    """What rank 0 chooses, as a process alone would, on every rank, with the task entered.

    Passes over all training samples that go before are shared by the ranks; what they cannot share (placing and cutting
    data, the fit of a Gaussian) all do at the same time; only for the pilots, and for the plan, do the others wait.
    """
    before, budget = None if log is None else log.chosen, dataclasses.replace(budget, sharing=ranks.local_size)
    chosen = ranks.decide(lambda: None if before is None else {"passes": before["passes"]})
    run.arrange(passes, chosen, ranks, budget=budget)
    with run.task:
        run.choose(before, bar, ranks)
        run.take_turns()  # what a device has left is not asked here

        def plan() -> dict[str, Any]:
            run.announce(bar)
            with run.timings.measure("plan"):
                step = run.time_a_step()
                mesh = _mesh(run, ranks, log, step)
                saved = None if before is None else before["layout"]
                layout = plan_share(run, request, mesh, budget, bar, step, path, saved)
            return {"layout": dataclasses.asdict(layout), "mesh": dataclasses.asdict(mesh)}

        planned = ranks.decide(plan)
        layout = Layout(**planned["layout"])
        budget.plan(layout.peak_bytes)
        ranks.all_or_none(_too_large(ranks, request, layout, budget, path))
        yield {**run.choices.to_dict(), "layout": layout.to_dict(), "mesh": planned["mesh"]}, layout


def _mesh(run: Run, ranks: Ranks, log: RunLog | None, step_seconds: float) -> Mesh:
    """The mesh of the run that is resumed, if it had as many ranks; else the quickest."""
    saved = None if log is None or log.chosen is None else log.chosen.get("mesh")
    if saved is not None and Mesh(**saved).ranks == ranks.size:
        return Mesh(**saved)
    draws = dict.fromkeys(range(run.num_chains), 0) if log is None else log.unfinished()
    steps_per_draw = run.sampler.steps(run.num_draws) / run.num_draws
    return choose_mesh(
        ranks.size,
        [run.num_draws - made for made in draws.values()],
        steps_per_draw * step_seconds,
        run.pass_seconds * run.probe.num_samples,
    )


def _too_large(ranks: Ranks, request: dict[str, Any], layout: Layout, budget: Budget, path: Path | None) -> str | None:
    """Why this rank cannot hold its share, or None."""
    needed = peak_of(layout, request, ranks.first and path is None) - layout.taken_bytes
    taken = budget.taken()
    limit = budget.limit(taken) - taken
    if needed <= limit:
        return None
    return f"needs {gigabytes(needed)} more for its share of the kernel, and {gigabytes(limit)} are left for it"


def rounds(work: Work) -> Iterator[tuple[list[Received], Panel | None]]:
    """Round by round until all draws are made: a panel of each row that has one, and this rank's own as it was sent.

    Raises:
        DivergedError: a chain diverged, on whatever rank: on all of them, after the same round.
    """
    log, run, panel = work.log, work.run, work.request["panel"]
    made = dict.fromkeys(range(run.num_chains), 0) if log is None else log.unfinished()
    dealt = deal_chains(sorted(made), work.mesh)
    steps = schedule(dealt, made, panel, run.num_draws)
    row, shard = work.mesh.place(work.ranks.rank)
    probes = cut_probe(run.probe, run.task.passes.probe_batch, work.mesh.shards)
    exchange = Exchange(work.ranks, work.mesh, [probe.rows for probe in probes], panel)
    starts = {chain: None if log is None else log.state_of(chain) for chain in dealt[row]}
    done = sum(start.step for start in starts.values() if start is not None)
    work.bar.start(len(starts) * run.sampler.steps(run.num_draws), done)
    own = (
        part
        for chain, start in starts.items()
        for part in run.chain_panels(chain, probes[shard], panel, work.bar, start)
    )
    sent: Panel | None = None
    error: DivergedError | None = None
    for number in range(max(map(len, steps)) + 1):
        items = [items[number] if number < len(items) else None for items in steps]
        part = None
        if items[row] is not None and error is None:
            try:
                part = next(own)
            except DivergedError as diverged:  # the others are to hear of it in their turn
                error = diverged
        if number > 0:
            with run.timings.measure("wait"):
                received = exchange.receive()
            yield received, sent
        if any(items):
            exchange.send(items, part, error)
            sent = part


def meta(work: Work) -> dict[str, Any]:
    """What is kept beside the numbers."""
    return {
        **record.meta(work.run, work.request),
        "memory": {**work.layout.to_dict(), "planned_peak_bytes": work.layout.peak_bytes},
        "ranks": {"size": work.ranks.size, **dataclasses.asdict(work.mesh)},
    }
