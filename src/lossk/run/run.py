"""One run: the validated inputs of a call, its pilot, its cost, its panels, its diagnostics."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lossk import provenance
from lossk.accumulate.panel import Panel, chain_panels
from lossk.accumulate.trace_watch import TraceWatch
from lossk.curvature.metric import describe_metric, set_metric
from lossk.data.data import Samples, Transform
from lossk.data.probe_sets import read_sources
from lossk.data.room import Room
from lossk.memory import Budget
from lossk.pilot.effective_dimension import count_directions
from lossk.pilot.passes_pilot import Load, choose_passes, load_of
from lossk.pilot.pilot import Pilot
from lossk.plan.device_room import place_data
from lossk.plan.pass_memory import fit_passes, fit_together, pass_bytes
from lossk.probe.anchor import evaluate_anchor
from lossk.probe.arrangement import Arrangement, cut, settle
from lossk.probe.probe import Probe, prepare_probe, rows_fingerprint, token_fingerprint
from lossk.ranks.world import ALONE, World
from lossk.run.backends import choose_ops
from lossk.run.choices import Choices
from lossk.run.choose import choose
from lossk.run.judging import Working, foreseen_vectors, informed_pilot, plan_judging, working_bytes
from lossk.samplers.chain import Chain, ChainState, Surroundings, time_a_step
from lossk.samplers.samplers import Sampler, fit, fit_early, make_chain
from lossk.samplers.sgld import SGLD
from lossk.store.witness import check_start
from lossk.task.agreement import witness_of
from lossk.task.losses import LossFunction, resolve_loss
from lossk.task.passes import Passes, resumed_passes
from lossk.task.task import Task
from lossk.timings import Progress, Timings, as_table


@dataclass
class Run:
    """One call's validated inputs, what the pilot chose, and what is collected along the way."""

    task: Task
    probe: Probe
    train: Samples
    asked: Sampler
    sampler: Sampler  # as asked for, until `choose` resolves it
    num_chains: int
    num_draws: int
    backend: str
    ops: dict[str, str]  # what each op runs with
    seed: int
    fingerprints: dict[str, str]
    witness: dict[str, Any]  # losses at w* of a few samples
    started: float
    watch: TraceWatch
    warnings: list[str]
    pilot: Pilot | None = None
    reasons: list[str] = field(default_factory=list)
    passes_reasons: list[str] = field(default_factory=list)
    scales: dict[str, float] | None = None  # of the sampled parameters, where a metric gives each its own
    fitted: dict[str, Tensor] = field(default_factory=dict)  # what the sampler's chains share
    timings: Timings = field(default_factory=Timings)
    pass_seconds: float = 0.0  # of one training sample's loss at w*
    # [n] float64, losses of `train` at w*
    anchor_losses: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64, device="cpu"))

    @classmethod
    def prepare(
        cls,
        model: nn.Module,
        loader: Any,
        train: Any,
        loss: str | LossFunction,
        sampler: Sampler,
        num_chains: int,
        num_draws: int,
        backend: str,
        device: str | torch.device | None,
        precision: str | None,
        seed: int,
        transform: Transform | None = None,
        bar: Progress | None = None,
        room: Room | None = None,
    ) -> Run:
        started = time.perf_counter()
        task = Task(model, resolve_loss(loss), params=sampler.params, device=device, precision=precision)
        chosen = choose_ops(backend, task.device)
        task.loss = resolve_loss(loss, chosen.ops["sample_loss"])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sets, train_samples = read_sources(loader, train, transform, bar=bar, room=room, pads=True)
        for warning in caught:  # shown all the same; kept with the result
            warnings.warn(warning.message, warning.category, stacklevel=3)
        fingerprints = {"model": provenance.model_fingerprint(model), "probe": rows_fingerprint(sets)}
        lone = sets.get("") is train_samples
        fingerprints["train"] = fingerprints["probe"] if lone else train_samples.fingerprint()
        notes = [*chosen.reasons, *place_data(task, [*sets.values(), train_samples])]
        read = time.perf_counter()
        probe, train_samples = prepare_probe(task, sets, train_samples)
        named = {part.name: part.samples for part in probe.parts}
        witness = witness_of(task, named if probe.holds(train_samples) else {**named, "train": train_samples})
        checked = time.perf_counter()
        if probe.tokens is not None:
            fingerprints["tokens"] = token_fingerprint(probe.tokens)
        run = cls(
            task=task,
            probe=probe,
            train=train_samples,
            asked=sampler,
            sampler=sampler,
            num_chains=num_chains,
            num_draws=num_draws,
            backend=chosen.backend,
            ops=chosen.ops,
            passes_reasons=[*notes, *task.notes],
            seed=seed,
            fingerprints=fingerprints,
            witness=witness,
            started=started,
            warnings=[str(warning.message) for warning in caught],
            watch=TraceWatch(num_chains, num_draws, len(probe)),
        )
        run.timings.seconds |= {"check": checked - read, "prepare": time.perf_counter() - started - (checked - read)}
        return run

    @property
    def num_train(self) -> int:
        """n, the terms of the training loss: samples, or unmasked tokens."""
        return self.task.loss.num_terms(len(self.train))

    def arrange(self, passes: Passes | None, chosen: dict[str, Any] | None, world: World, budget: Budget) -> None:
        """Settle how the passes are run: as given, as `chosen` before, or by a pilot; before the task is entered.

        Args:
            world: the ranks of the run, which all call this; rank 0's pilot is everyone's.
            budget: batches that are not given take no more than a part of it.
        """
        given = passes if chosen is None else Passes(**chosen["passes"])
        budget.mark()
        probe, batch = self.probe.parts[0].samples, self._load(self.asked).minibatch
        vectors = foreseen_vectors(self.asked, self._passes_of(self.asked), self.num_chains, piloted=chosen is None)
        fit = partial(fit_passes, self.task, probe, self.train, batch, budget, vectors, given)
        self.passes_reasons += fit_together(self.task, world, fit)
        plain = Arrangement.plain(self.task, self.probe, self.train)
        if chosen is not None:
            plain = dataclasses.replace(plain, passes=resumed_passes(passes, Passes(**chosen["passes"])))
        elif passes is not None:
            plain = dataclasses.replace(plain, passes=passes)
        with self.timings.measure("prefix"):
            arranged, reasons = cut(self.task, plain, self.ops["head_loss"])
        self.probe, self.train = arranged.probe, arranged.train
        self.passes_reasons += reasons
        if passes is None and chosen is None:
            found, reasons = world.decide(self._measure_passes)
            arranged = dataclasses.replace(arranged, passes=Passes(**found))
            self.passes_reasons += reasons
        self._settle(arranged, plain, world)

    def _settle(self, arranged: Arrangement, plain: Arrangement, world: World) -> None:
        """Prove that the passes are the user's model, and do without the rewritings that are not."""

        def settled() -> tuple[dict[str, Any], list[str]]:
            passes, reasons = settle(self.task, arranged, plain, self._load(self.asked).minibatch)
            return passes.to_dict(), reasons

        with self.timings.measure("check"):
            found, reasons = world.decide(settled)
        arranged = arranged.as_settled(Passes(**found), plain)
        arranged.set(self.task)
        self.passes_reasons += reasons
        if self.task.device.type != "cuda":
            self.take_turns()
        if self.task.channels_last:
            arranged = arranged.holding(self.task.place)
        self.probe, self.train = arranged.probe, arranged.train

    def _measure_passes(self) -> tuple[dict[str, Any], list[str]]:
        with self.timings.measure("pilot"):
            passes, reasons = choose_passes(self.task, self.probe.parts[0].samples, self.train, self._load(self.asked))
        return passes.to_dict(), reasons

    def take_turns(self) -> None:
        """Have probe and steps take turns where nobody has asked for anything else."""
        if self.task.passes.overlap == "auto":
            self.task.passes = dataclasses.replace(self.task.passes, overlap=False)

    def _load(self, sampler: Sampler) -> Load:
        return load_of(sampler, self.num_chains, self.num_draws, len(self.train))

    def _passes_of(self, sampler: Sampler) -> float:
        """The run's passes with that sampler, in forward passes of one sample."""
        return self._load(sampler).forward_passes(self.probe.num_samples)

    def choose(self, chosen: dict[str, Any] | None, bar: Progress | None = None, world: World = ALONE) -> None:
        """Losses at w*, the pilot's measurements, and every "auto" filled in (or all as `chosen` before).

        Args:
            world: its ranks all call this: they share the passes over all training samples, to the same bits.
                Rank 0 has the pilot, or knows what was `chosen`; its choices are everyone's.
        """
        with self.timings.measure("fit"):
            self.scales = set_metric(self.asked, self.task, self.train, chosen, world)
        self.anchor_losses, self.pass_seconds = evaluate_anchor(self.task, self.train, self.timings, world)
        with self.timings.measure("fit"):
            early = fit_early(self.sampler, self.task, self.train, world)
        self.fitted = dict(early)
        choices = world.decide(lambda: self._chosen_here(chosen, bar))
        if not world.first:
            self._choose(choices, bar)
        if world.size == 1:
            early = self.fitted  # with what trial chains needed, which other ranks do not have
        with self.timings.measure("fit"):
            self.fitted = fit(self.sampler, self.task, self.train, seed=self.seed, early=early, world=world)

    def _chosen_here(self, chosen: dict[str, Any] | None, bar: Progress | None) -> dict[str, Any]:
        self._choose(chosen, bar)
        return self.choices.to_dict()

    @property
    def choices(self) -> Choices:
        """What was chosen up to now."""
        return Choices(
            pilot=self.pilot,
            sampler=self.sampler,
            reasons=self.reasons,
            passes=self.task.passes,
            anchor_loss=float(self.anchor_losses.mean()),
            scales=self.scales,
        )

    def _choose(self, chosen: dict[str, Any] | None, bar: Progress | None) -> None:
        if chosen is not None:
            allowed = max(each.repeatable for each in self.task.called.values())
            check_start(chosen.get("anchor_loss"), float(self.anchor_losses.mean()), allowed)
            self.pilot = None if chosen["pilot"] is None else Pilot(**chosen["pilot"])
            self.sampler, self.reasons = type(self.asked)(**chosen["sampler"]), chosen["reasons"]
            return
        with self.timings.measure("pilot"):
            self.sampler, self.pilot, self.reasons = choose(
                self.sampler,
                self._around(Timings()),
                num_probe=self.probe.num_samples,
                run_passes=self._passes_of(self.asked),
                bar=bar,
            )
            self.pilot, beaten = count_directions(
                self.pilot, self.sampler, self.task, self.train, self._passes_of(self.sampler)
            )
        self.reasons += [*describe_metric(self.scales), *beaten]

    def announce(self, bar: Progress) -> None:
        """Say what was chosen."""
        n = len(self.train)
        bar.say(
            f"lossk: {len(self.probe)} {self.task.loss.unit}, {self.task.num_weights} weights, "
            f"{self.num_chains} chains x {self.num_draws} draws, backend {self.backend}"
        )
        if self.pilot is not None:
            bar.say(f"pilot: {self.pilot.describe(n)}")
        for line in as_table([*self.passes_reasons, *self.reasons]):
            bar.say(line)
        if isinstance(self.sampler, SGLD) and self.pilot is not None:
            bar.say(f"  expected: {self.pilot.foresee(self.sampler, n)}")

    def working(self, budget: Budget, taken: int, *, piloted: bool) -> Working:
        """What passes and vectors take; `piloted`: a pilot went before."""
        batch, judged = self._load(self.asked).minibatch, self._around(Timings()).judging.samples > 0
        passes = pass_bytes(self.task, self.probe.parts[0].samples, self.train, batch)
        return working_bytes(self.task, passes, self.asked, self.sampler, budget, taken, judged=judged, piloted=piloted)

    def _around(self, timings: Timings) -> Surroundings:
        return Surroundings(
            self.task,
            self.train,
            self.anchor_losses,
            self.seed,
            self.ops["sgld_step"],
            timings,
            fitted=self.fitted,
            judging=plan_judging(self.sampler, self.pilot, self._passes_of(self.sampler), self.num_chains),
        )

    @property
    def informed_pilot(self) -> Pilot | None:
        """The pilot with what the chains measured at their last draws."""
        return informed_pilot(self.pilot, self.sampler, self.watch)

    def _chain(self, chain: int, timings: Timings) -> Chain:
        return make_chain(self.sampler, self._around(timings), chain)

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
