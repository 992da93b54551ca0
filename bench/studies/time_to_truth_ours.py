"""lossk's side of `bench.studies.time_to_truth`: the law, the reference kernel, and the seconds of each sampler."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import lossk
from bench.studies.time_to_truth_networks import Network
from bench.studies.time_to_truth_statistics import MEASURES, Entries, Running, draws_needed, entries, reliability

NUM_CHAINS, NUM_DRAWS = 4, 200  # build_kernel's defaults
REFERENCE_CHAINS, REFERENCE_SEED = 8, 20_000
FINER = 2
RELIABLE = 0.99
# Of one thread, which never waits, the processor's time is the wall's on a machine with nothing else to do.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Law:
    """The distribution every sampler is to draw from, as lossk's defaults choose it for a network."""

    n_beta: float
    localization: float
    sgld: lossk.SGLD  # resolved at this law: its lr is the middle of the peer's grid


# What is measured besides the peers, by name: from the law to a sampler. The first is "ours"; None leaves all to lossk.
Variant = Callable[[Law], Any]
VARIANTS: dict[str, Variant] = {
    "lossk default": lambda law: None,
    "lossk SGLD, rmsprop-frozen": lambda law: lossk.SGLD(
        n_beta=law.n_beta, localization=law.localization, preconditioner="rmsprop-frozen"
    ),
    "lossk SGLD, Euler": lambda law: lossk.SGLD(n_beta=law.n_beta, localization=law.localization, integrator="euler"),
    "lossk BAOAB": lambda law: lossk.BAOAB(n_beta=law.n_beta, localization=law.localization),
}


@dataclass
class Result:
    """One sampler on one network. Seconds and draws are those at which a measure's likeness first reached the level."""

    name: str
    settings: dict[str, Any]
    seconds: dict[str, float | None] = field(default_factory=lambda: dict.fromkeys(MEASURES))
    draws: dict[str, int | None] = field(default_factory=lambda: dict.fromkeys(MEASURES))  # per chain
    ran: float = 0.0  # seconds of all its draws
    ran_draws: int = 0  # per chain
    likeness: dict[str, float] = field(default_factory=dict)  # at the last draw
    note: str = ""

    def read(self, running: Running, level: float, clock: Callable[[int], float]) -> None:
        """Fill in the outcome; `clock(d)` is the time a run of d draws per chain takes."""
        self.ran_draws = running.losses.shape[1]
        self.ran, self.likeness = clock(self.ran_draws), running.at(self.ran_draws)
        for measure in MEASURES:
            draws = running.passage(measure, level).draws
            self.draws[measure] = draws
            self.seconds[measure] = None if draws is None else clock(draws)


@dataclass(frozen=True)
class Reference:
    """The kernel taken for the truth."""

    entries: Entries
    reliability: dict[str, float]
    num_chains: int
    num_draws: int
    seconds: float
    settings: dict[str, Any]


def timed(
    network: Network, sampler: Any, *, num_chains: int, num_draws: int, seed: int, clock: str = "wall"
) -> tuple[Any, float]:
    """Loss traces, and the seconds from the call on: pilot and tuning included."""
    start = CLOCKS[clock]()
    traces = lossk.sample_losses(
        network.model,
        network.probe,
        train=network.train,
        sampler=sampler,
        num_chains=num_chains,
        num_draws=num_draws,
        seed=seed,
        progress=False,
    )
    return traces, CLOCKS[clock]() - start


def find_law(network: Network, sampler: Any = None, seed: int = 0) -> Law:
    """The law that lossk's defaults (or `sampler`) choose, and the settings there of Euler's step, the peer's."""
    chosen = timed(network, sampler, num_chains=1, num_draws=2, seed=seed)[0].meta["sampler"]
    law = {key: float(chosen[key]) for key in ("n_beta", "localization")}
    resolved = timed(network, lossk.SGLD(**law, integrator="euler"), num_chains=1, num_draws=2, seed=seed)[0].meta[
        "sampler"
    ]
    return Law(**law, sgld=lossk.SGLD(**resolved))


def make_reference(network: Network, law: Law, seconds: float, clock: str = "wall") -> Reference:
    """A long run of BAOAB at half its automatic step, of other noise, in about `seconds`.

    Another sampler than any that is timed against devinterp's: its step has no bias on a quadratic, and the noise that
    its control variate leaves is measured. A quarter of the time goes into a first run, whose reliability says how long
    the second must be; if the first is reliable enough, it is the reference.
    """
    automatic = lossk.BAOAB(n_beta=law.n_beta, localization=law.localization)
    chosen = timed(network, automatic, num_chains=1, num_draws=2, seed=REFERENCE_SEED)[0].meta["sampler"]
    sampler = lossk.BAOAB(
        **{
            **chosen,
            "step_size": chosen["step_size"] / FINER,
            "num_burnin_steps": chosen["num_burnin_steps"] * FINER,
            "num_steps_bw_draws": chosen["num_steps_bw_draws"] * FINER,
        }
    )

    def run(num_draws: int, seed: int) -> tuple[Any, float]:
        return timed(network, sampler, num_chains=REFERENCE_CHAINS, num_draws=num_draws, seed=seed, clock=clock)

    started = CLOCKS[clock]()
    fixed = run(2, REFERENCE_SEED)[1]
    each = max(run(12, REFERENCE_SEED)[1] - fixed, 1e-3) / 10
    num_draws = max(20, int((seconds / 4 - fixed) / each))
    traces, spent = run(num_draws, REFERENCE_SEED)
    found = reliability(traces.losses)
    if found["R"] < RELIABLE:
        odds = [value / max(1 - value, 1e-9) for value in (RELIABLE, max(found["R"], 0.01))]
        left = seconds - (CLOCKS[clock]() - started) - fixed
        wanted = min(math.ceil(1.2 * num_draws * odds[0] / odds[1]), int(left / each))
        if wanted > 1.2 * num_draws:
            num_draws = wanted
            traces, spent = run(num_draws, REFERENCE_SEED + 1)
            found = reliability(traces.losses)
    return Reference(entries(traces.losses), found, REFERENCE_CHAINS, num_draws, spent, sampler.to_dict())


def measure(
    name: str,
    network: Network,
    sampler: Any,
    reference: Reference,
    *,
    level: float,
    seconds: float,
    seed: int,
    clock: str = "wall",
) -> Result:
    """Seconds from the call until R's likeness to the reference reaches `level`, with lossk's default chains.

    A run of 2 draws per chain is timed and one of enough, from 200 on; times between lie on the line between the two.
    At most about `seconds` are spent on the longer run.
    """

    def run(num_draws: int) -> tuple[Any, float]:
        return timed(network, sampler, num_chains=NUM_CHAINS, num_draws=num_draws, seed=seed, clock=clock)

    short = run(2)[1]
    num_draws = NUM_DRAWS
    while True:
        try:
            traces, long = run(num_draws)
        except lossk.DivergedError as error:
            return Result(name, {}, note=f"diverged: {error}")
        each = max(long - short, 0.0) / (num_draws - 2)
        running = Running(traces.losses, reference.entries)
        likeness = running.at(num_draws)["R"]
        most = 2 + int((seconds - short) / max(each, 1e-9))
        if likeness >= level or num_draws >= most:
            break
        needed = 1.3 * draws_needed(num_draws, likeness, level)
        num_draws = min(max(math.ceil(min(needed, most)), num_draws + 1), max(most, num_draws + 1))
    settings = {"num_chains": NUM_CHAINS, **traces.meta["sampler"]}
    result = Result(name, settings)
    result.read(running, level, lambda draws: short + (draws - 2) * each)
    return result


def saved_reference(runs: Path, network: Network, *, seed: int) -> tuple[Law, Reference]:
    """The law and the long run of `bench.studies.fashion_auto`."""
    auto, long = (torch.load(runs / f"{name}.pt", weights_only=True) for name in ("auto", "long"))
    law = {key: float(json.loads(auto["meta"])["sampler"][key]) for key in ("n_beta", "localization")}
    euler = timed(network, lossk.SGLD(**law, integrator="euler"), num_chains=1, num_draws=2, seed=seed)[0]
    losses, settings = long["losses"], json.loads(long["meta"])["sampler"]
    reference = Reference(
        entries(losses), reliability(losses), losses.shape[0], losses.shape[1], long["seconds"], settings
    )
    return Law(**law, sgld=lossk.SGLD(**euler.meta["sampler"])), reference


def saved_run(runs: Path, network: Network, reference: Reference, *, level: float, seed: int, clock: str) -> Result:
    """The automatic run of `bench.studies.fashion_auto`, and one of two draws for what comes before the draws."""
    auto = torch.load(runs / "auto.pt", weights_only=True)
    short = timed(network, None, num_chains=NUM_CHAINS, num_draws=2, seed=seed, clock=clock)[1]
    each = max(auto["seconds"] - short, 0.0) / (auto["losses"].shape[1] - 2)
    result = Result("lossk default", {"num_chains": NUM_CHAINS, **json.loads(auto["meta"])["sampler"]})
    result.read(Running(auto["losses"], reference.entries), level, lambda draws: short + (draws - 2) * each)
    return result
