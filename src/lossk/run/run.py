"""One run, its every setting known: what it needs to sample, and what is collected along the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lossk.accumulate.panel import Panel, chain_panels
from lossk.accumulate.trace_watch import TraceWatch
from lossk.curvature.metric import describe_metric, set_metric
from lossk.memory import Budget
from lossk.pilot.effective_dimension import count_directions
from lossk.pilot.effort import ROUGH
from lossk.pilot.pilot import Pilot
from lossk.plan.pass_memory import pass_bytes
from lossk.probe.anchor import evaluate_anchor
from lossk.probe.probe import Probe
from lossk.ranks.world import ALONE, World
from lossk.run.choices import Choices
from lossk.run.choose import choose
from lossk.run.judging import Working, informed_pilot, plan_judging, working_bytes
from lossk.run.prepare import Prepared
from lossk.samplers.chain import Chain, ChainState, Surroundings, time_a_step
from lossk.samplers.samplers import Sampler, fit, fit_early, make_chain
from lossk.samplers.sgld import SGLD
from lossk.store.witness import check_start
from lossk.timings import Progress, Timings, as_table


@dataclass(frozen=True, kw_only=True)
class Run(Prepared):
    """What a call asks for, with its every setting filled in; and the watch that notes its draws."""

    sampler: Sampler
    pilot: Pilot | None
    reasons: tuple[str, ...]
    scales: dict[str, float] | None  # of the sampled parameters, where a metric gives each its own
    fitted: dict[str, Tensor]  # what the sampler's chains share
    anchor_losses: Tensor  # [n] float64, losses of `train` at w*
    pass_seconds: float  # of one training sample's loss at w*
    watch: TraceWatch

    @property
    def choices(self) -> Choices:
        """What was chosen."""
        return Choices(
            pilot=self.pilot,
            sampler=self.sampler,
            reasons=list(self.reasons),
            passes=self.task.passes,
            anchor_loss=float(self.anchor_losses.mean()),
            scales=self.scales,
        )

    def working(self, budget: Budget, taken: int, *, piloted: bool) -> Working:
        """What passes and vectors take; `piloted`: a pilot went before."""
        batch, judged = self.load.minibatch, self.around(Timings()).judging.samples > 0
        passes = pass_bytes(self.task, self.probe.parts[0].samples, self.train, batch)
        return working_bytes(self.task, passes, self.asked, self.sampler, budget, taken, judged=judged, piloted=piloted)

    def around(self, timings: Timings) -> Surroundings:
        """What a chain is given."""
        return Surroundings(
            self.task,
            self.train,
            self.anchor_losses,
            self.seed,
            self.ops["sgld_step"],
            timings,
            fitted=self.fitted,
            judging=plan_judging(self.sampler, self.pilot, self.passes_of(self.sampler), self.num_chains),
        )

    @property
    def informed_pilot(self) -> Pilot | None:
        """The pilot with what the chains measured at their last draws."""
        return informed_pilot(self.pilot, self.sampler, self.watch)

    def _chain(self, chain: int, timings: Timings) -> Chain:
        return make_chain(self.sampler, self.around(timings), chain)

    def time_a_step(self) -> float:
        """Seconds per step, from w* and back."""
        return time_a_step(self._chain(0, Timings()))

    def chain_panels(
        self, chain: int, probe: Probe, panel: int, bar: Progress, start: ChainState | None
    ) -> Iterator[Panel]:
        """The panels of one chain, of the losses of `probe`."""
        return chain_panels(
            self._chain(chain, self.timings),
            probe,
            panel=panel,
            num_draws=self.num_draws,
            timings=self.timings,
            progress=bar,
            start=start,
            device=self.task.device,
        )

    def begin_again(self, sampler: Sampler, why: str) -> Run:
        """The same run from w* on, without a draw, with other settings."""
        self.task.reset()
        watch = TraceWatch(self.num_chains, self.num_draws, len(self.probe))
        return dataclasses.replace(self, sampler=sampler, reasons=(*self.reasons, why), watch=watch)


def resolve(
    prepared: Prepared, chosen: dict[str, Any] | None, bar: Progress | None = None, world: World = ALONE
) -> Run:
    """The run: losses at w*, the pilot's measurements, and every "auto" filled in (or all as `chosen` before).

    Args:
        prepared: its task is entered.
        world: its ranks all call this: they share the passes over all training samples, to the same bits. Rank 0 has
            the pilot, or knows what was `chosen`; its choices are everyone's.
    """
    task, train, timings = prepared.task, prepared.train, prepared.timings
    with timings.measure("fit"):
        scales = set_metric(prepared.asked, task, train, chosen, world)
    anchor_losses, pass_seconds = evaluate_anchor(task, train, timings, world)
    with timings.measure("fit"):
        early = fit_early(prepared.asked, task, train, world)
    run = Run(
        **vars(prepared),
        sampler=prepared.asked,
        pilot=None,
        reasons=(),
        scales=scales,
        fitted=dict(early),
        anchor_losses=anchor_losses,
        pass_seconds=pass_seconds,
        watch=TraceWatch(prepared.num_chains, prepared.num_draws, len(prepared.probe)),
    )
    first = world.first_makes(lambda: _measured(run, bar) if chosen is None else _as_chosen(run, chosen))
    choices = world.decide(lambda: None if first is None else first.choices.to_dict())
    run = _as_chosen(run, choices) if first is None else first
    if world.size == 1:
        early = run.fitted  # with what trial chains needed, which other ranks do not have
    with timings.measure("fit"):
        fitted = fit(run.sampler, task, train, seed=run.seed, early=early, world=world)
    return dataclasses.replace(run, fitted=fitted)


def _as_chosen(run: Run, chosen: dict[str, Any]) -> Run:
    """With what was chosen before, or elsewhere."""
    allowed = max(each.repeatable for each in run.task.called.values())
    check_start(chosen.get("anchor_loss"), float(run.anchor_losses.mean()), allowed)
    pilot = None if chosen["pilot"] is None else Pilot(**chosen["pilot"])
    sampler = type(run.asked)(**chosen["sampler"])
    return dataclasses.replace(run, pilot=pilot, sampler=sampler, reasons=tuple(chosen["reasons"]))


def _measured(run: Run, bar: Progress | None) -> Run:
    """With what the pilot chooses."""
    passes = run.passes_of(run.asked)
    with run.timings.measure("pilot"):
        sampler, pilot, reasons = choose(
            run.asked, run.around(Timings()), num_probe=run.probe.num_samples, run_passes=passes, bar=bar
        )
        pilot, beaten = count_directions(pilot, sampler, run.task, run.train, run.passes_of(sampler))
    reasons = [*reasons, *describe_metric(run.scales), *beaten]
    rough = [f"settings are rough: {why.partition(': ')[2]}" for why in reasons if why.startswith(ROUGH)]
    warned = (*run.warnings, *rough)
    return dataclasses.replace(run, sampler=sampler, pilot=pilot, reasons=tuple(reasons), warnings=warned)


def announce(run: Run, bar: Progress) -> None:
    """Say what was chosen."""
    n = len(run.train)
    bar.say(
        f"lossk: {len(run.probe)} {run.task.loss.unit}, {run.task.num_weights} weights, "
        f"{run.num_chains} chains x {run.num_draws} draws, backend {run.backend}"
    )
    if run.pilot is not None:
        bar.say(f"pilot: {run.pilot.describe(n)}")
    for line in as_table([*run.passes_reasons, *run.reasons]):
        bar.say(line)
    if isinstance(run.sampler, SGLD) and run.pilot is not None:
        bar.say(f"  expected: {run.pilot.foresee(run.sampler, n)}")
