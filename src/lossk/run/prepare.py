"""From a call's arguments to a task that is ready to be entered: model and data checked, passes arranged and proven."""

from __future__ import annotations

import dataclasses
import time
import warnings
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from lossk import provenance
from lossk.data.data import Samples, Transform
from lossk.data.probe_sets import read_sources
from lossk.data.room import Room
from lossk.memory import Budget
from lossk.pilot.passes_pilot import Load, choose_passes, load_of
from lossk.plan.device_room import place_data
from lossk.plan.pass_memory import fit_passes, fit_together
from lossk.probe.arrangement import Arrangement, cut, settle
from lossk.probe.probe import Probe, prepare_probe, rows_fingerprint, token_fingerprint
from lossk.ranks.world import ALONE, World
from lossk.run.backends import choose_ops
from lossk.run.judging import foreseen_vectors
from lossk.samplers.samplers import Sampler
from lossk.task.agreement import witness_of
from lossk.task.losses import LossFunction, resolve_loss
from lossk.task.passes import Passes, resumed_passes
from lossk.task.task import Task
from lossk.timings import Progress, Timings


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """One call's validated inputs."""

    task: Task
    probe: Probe
    train: Samples
    asked: Sampler
    num_chains: int
    num_draws: int
    backend: str
    ops: dict[str, str]  # what each op runs with
    seed: int
    fingerprints: dict[str, str]
    witness: dict[str, Any]  # losses at w* of a few samples
    started: float
    warnings: tuple[str, ...]
    passes_reasons: tuple[str, ...]
    timings: Timings = field(default_factory=Timings)

    @property
    def num_train(self) -> int:
        """n, the terms of the training loss: samples, or unmasked tokens."""
        return self.task.loss.num_terms(len(self.train))

    @property
    def load(self) -> Load:
        """What the run will evaluate, as far as the settings asked for say it."""
        return self.load_of(self.asked)

    def load_of(self, sampler: Sampler) -> Load:
        """What the run would evaluate with that sampler."""
        return load_of(sampler, self.num_chains, self.num_draws, len(self.train))

    def passes_of(self, sampler: Sampler) -> float:
        """The run's passes with that sampler, in forward passes of one sample."""
        return self.load_of(sampler).forward_passes(self.probe.num_samples)

    def because(self, *reasons: str) -> Prepared:
        """The same with more to say of its passes."""
        return dataclasses.replace(self, passes_reasons=(*self.passes_reasons, *reasons))


def prepare(
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
    world: World = ALONE,
) -> Prepared:
    """Read the data, and check that the model gives each sample a loss at w*."""
    started, bar = time.perf_counter(), bar or Progress(False)
    timings = Timings(bar)
    task = Task(model, resolve_loss(loss), params=sampler.params, device=world.own_device(device), precision=precision)
    chosen = choose_ops(backend, task.device)
    task.use_loss(resolve_loss(loss, chosen.ops["sample_loss"]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sets, train_samples = read_sources(loader, train, transform, bar=bar, room=room, pads=True)
    for warning in caught:  # shown all the same; kept with the result
        warnings.warn(warning.message, warning.category, stacklevel=3)
    with bar.waiting("fingerprints of model and data"):
        fingerprints = {"model": provenance.model_fingerprint(model), "probe": rows_fingerprint(sets)}
        lone = sets.get("") is train_samples
        fingerprints["train"] = fingerprints["probe"] if lone else train_samples.fingerprint()
    notes = [*chosen.reasons, *place_data(task, [*sets.values(), train_samples])]
    read = time.perf_counter()
    with bar.waiting("checking that the model gives each sample a loss of its own"):
        probe, train_samples = prepare_probe(task, sets, train_samples)
        named = {part.name: part.samples for part in probe.parts}
        witness = witness_of(task, named if probe.holds(train_samples) else {**named, "train": train_samples})
    checked = time.perf_counter()
    if probe.tokens is not None:
        fingerprints["tokens"] = token_fingerprint(probe.tokens)
    timings.seconds |= {"check": checked - read, "prepare": time.perf_counter() - started - (checked - read)}
    return Prepared(
        task=task,
        probe=probe,
        train=train_samples,
        asked=sampler,
        num_chains=num_chains,
        num_draws=num_draws,
        backend=chosen.backend,
        ops=chosen.ops,
        seed=seed,
        fingerprints=fingerprints,
        witness=witness,
        started=world.begin(timings, started),
        warnings=tuple(str(warning.message) for warning in caught),
        passes_reasons=(*notes, *task.notes),
        timings=timings,
    )


def arrange(
    run: Prepared, passes: Passes | None, chosen: dict[str, Any] | None, world: World, budget: Budget
) -> Prepared:
    """Settle how the passes are run: as given, as `chosen` before, or by a pilot; before the task is entered.

    Args:
        world: its ranks all call this; rank 0's pilot is everyone's.
        budget: batches that are not given take no more than a part of it.
    """
    given = passes if chosen is None else Passes(**chosen["passes"])
    budget.mark()
    probe, batch = run.probe.parts[0].samples, run.load.minibatch
    vectors = foreseen_vectors(run.asked, run.passes_of(run.asked), run.num_chains, piloted=chosen is None)
    fit = partial(fit_passes, run.task, probe, run.train, batch, budget, vectors, given)
    run = run.because(*fit_together(run.task, world, fit))
    plain = Arrangement.plain(run.task, run.probe, run.train)
    if chosen is not None:
        plain = dataclasses.replace(plain, passes=resumed_passes(passes, Passes(**chosen["passes"])))
    elif passes is not None:
        plain = dataclasses.replace(plain, passes=passes)
    with run.timings.measure("prefix"):
        arranged, reasons = cut(run.task, plain, run.ops["head_loss"], budget)
    run = dataclasses.replace(run.because(*reasons), probe=arranged.probe, train=arranged.train)
    if passes is None and chosen is None:
        found, reasons = world.decide(partial(_measured_passes, run))
        arranged = dataclasses.replace(arranged, passes=Passes(**found))
        run = run.because(*reasons)
    return _settled(run, arranged, plain, world)


def _measured_passes(run: Prepared) -> tuple[dict[str, Any], list[str]]:
    with run.timings.measure("pilot"):
        passes, reasons = choose_passes(run.task, run.probe.parts[0].samples, run.train, run.load)
    return passes.to_dict(), reasons


def _settled(run: Prepared, arranged: Arrangement, plain: Arrangement, world: World) -> Prepared:
    """Prove that the passes are the user's model, and do without the rewritings that are not."""

    def settled() -> tuple[dict[str, Any], list[str]]:
        passes, reasons = settle(run.task, arranged, plain, run.load.minibatch)
        return passes.to_dict(), reasons

    with run.timings.measure("check"):
        found, reasons = world.decide(settled)
    arranged = arranged.as_settled(Passes(**found), plain)
    arranged.set(run.task)
    if run.task.device.type != "cuda":
        take_turns(run.task)
    if run.task.channels_last:
        arranged = arranged.holding(run.task.place)
    return dataclasses.replace(run.because(*reasons), probe=arranged.probe, train=arranged.train)


def take_turns(task: Task) -> None:
    """Have probe and steps take turns where nobody has asked for anything else."""
    if task.passes.overlap == "auto":
        task.set_overlap(False)
