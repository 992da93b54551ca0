"""Every "auto" of any sampler: whether a pilot is needed, and what follows from it."""

from __future__ import annotations

import dataclasses
import math

from lossk.diagnostics.bias import BIAS_BUDGET
from lossk.pilot import modes
from lossk.pilot.automatic_baoab import choose_baoab, kick_noise, steps_to_forget
from lossk.pilot.effort import Effort, effort_of
from lossk.pilot.pilot import Pilot, default_n_beta, run_pilot
from lossk.pilot.step_choice import STABILITY_BUDGET
from lossk.pilot.trial import settle
from lossk.pilot.vectors import chooses
from lossk.samplers.baoab import BAOAB
from lossk.samplers.chain import Surroundings
from lossk.samplers.gaussian import Gaussian
from lossk.samplers.samplers import Sampler
from lossk.samplers.sgld import SGLD
from lossk.settings import SteppingSettings, minibatch_of
from lossk.timings import Progress

PILOT_SEED = 0x105  # of all that the pilot draws
WORTH_SAYING = 2.0  # times fewer gradients, or longer steps


def choose(
    sampler: Sampler,
    around: Surroundings,
    *,
    num_probe: int,
    run_passes: float = math.inf,
    bar: Progress | None = None,
) -> tuple[Sampler, Pilot | None, list[str]]:
    """(the sampler with every "auto" and the default n_beta filled in, the pilot if one was run, reasons).

    Args:
        run_passes: what the run's own passes come to, in forward passes of one sample.
    """
    around = dataclasses.replace(around, seed=PILOT_SEED)  # what is chosen does not depend on the run's noise
    task, train, seed = around.task, around.train, PILOT_SEED
    if isinstance(sampler, Gaussian):
        return sampler, None, []
    reasons: list[str] = []
    if isinstance(sampler, SGLD):
        effort = _effort(sampler, around, run_passes)
        pilot = run_pilot(task, train, sampler, effort, seed=seed)
        resolved, pilot, reasons = settle(sampler, pilot, around, num_probe=num_probe, effort=effort, bar=bar)
        if sampler.lr == "auto":
            reasons += _praise_of_averaging(resolved, pilot) + _praise_of_momentum(resolved, pilot)
        return resolved, pilot, reasons + _roughness(effort)
    if sampler.n_beta is None:
        terms = task.loss.num_terms(len(train))
        n_beta = default_n_beta(terms)
        sampler = dataclasses.replace(sampler, n_beta=n_beta)
        reasons.append(f"n_beta = {n_beta:.4g}: n / ln n of the {terms} training {task.loss.unit}")
    if not sampler.has_auto:
        return sampler, None, reasons
    effort = _effort(sampler, around, run_passes)
    # The law is that of SGLD's default, whatever the sampler.
    metric = getattr(sampler, "metric", None)
    alike = SGLD(n_beta=sampler.n_beta, localization=sampler.localization, metric=metric, params=sampler.params)
    pilot = run_pilot(task, train, alike, effort, seed=seed)
    if sampler.localization == "auto":
        sgld, pilot, whys = settle(alike, pilot, around, num_probe=num_probe, effort=effort, bar=bar)
        sampler = dataclasses.replace(sampler, localization=float(sgld.localization))
        reasons += [why for why in whys if why.startswith("localization")]
    if isinstance(sampler, BAOAB) and sampler.step_size == "auto" and float(sampler.localization) > 0:
        # What noise a control variate leaves away from w*, only a trial chain can say.
        alike = dataclasses.replace(alike, localization=sampler.localization)
        if sampler.control_variate:
            batch = minibatch_of(sampler.batch_size, len(train))
            alike = dataclasses.replace(alike, control_variate=True, batch_size=batch)
        if pilot.drawn_curvature is None or sampler.control_variate:
            _, pilot, _ = settle(alike, pilot, around, num_probe=num_probe, effort=effort, bar=bar)
    if isinstance(sampler, BAOAB):
        sampler, pilot, more = choose_baoab(sampler, pilot, len(train), task.num_weights)
        reasons += more
    return sampler, pilot, reasons + _roughness(effort)


def _effort(sampler: Sampler, around: Surroundings, run_passes: float) -> Effort:
    share = sampler.pilot_budget if isinstance(sampler, SteppingSettings) else None
    return effort_of(around.task, around.train, run_passes, automatic=chooses(sampler), share=share)


def _roughness(effort: Effort) -> list[str]:
    return [effort.describe()] if effort.rough else []


def _praise_of_averaging(sampler: SGLD, pilot: Pilot) -> list[str]:
    """A line, if averaged noise would allow a much longer step: where discretisation, not minibatch noise, binds."""
    if sampler.averaged or sampler.preconditioner is not None or sampler.measure_acceptance:
        return []
    shares = (pilot.typical_share(sampler) / STABILITY_BUDGET, pilot.noise_ratio(sampler) / BIAS_BUDGET)
    if max(shares) <= 0 or max(shares) * WORTH_SAYING > 1:
        return []
    return [
        "elsewhere = averaged noise: SGLD(integrator='leimkuhler-matthews') would take steps "
        f"{1 / max(shares):.1f} times as long, without bias in a quadratic"
    ]


def _praise_of_momentum(sampler: SGLD, pilot: Pilot) -> list[str]:
    """A line, if kinetic Langevin dynamics would forget flat directions with far fewer gradients (in a quadratic)."""
    lowest = float(sampler.localization)
    if lowest <= 0 or pilot.stiffest(lowest) <= 0:
        return []
    if pilot.batch_factor > 0 and pilot.control_variance is None:
        return []  # what noise its kicks would have is not known
    theirs = 2 * steps_to_forget(pilot, lowest, controlled=True)
    ours = (2 if sampler.control_variate else 1) * 2.0 / (float(sampler.lr) * sampler.gain * lowest)
    if ours < WORTH_SAYING * theirs:
        return []
    return [f"elsewhere = BAOAB: lossk.BAOAB() would forget flat directions in {theirs} gradients, not {ours:.0f}"]


def momentum_noise_ratio(sampler: Sampler, pilot: Pilot | None) -> float | None:
    """Minibatch noise of BAOAB's kicks over its thermostat's, in its worst direction; None if none, or unknown."""
    if not isinstance(sampler, BAOAB) or pilot is None or not pilot.knows_noise(sampler.control_variate):
        return None
    noise = pilot.noise_per_lr(sampler.control_variate, float(sampler.localization))
    return kick_noise(float(sampler.step_size), float(sampler.friction), noise)


def burnin_spread(sampler: Sampler, pilot: Pilot | None) -> float | None:
    """The share of its stationary variance that BAOAB's slowest mode has at the first draw; None if not known."""
    if not isinstance(sampler, BAOAB) or pilot is None or not float(sampler.localization) > 0:
        return None
    lowest = float(sampler.localization)
    return modes.spread(
        float(sampler.step_size), float(sampler.friction), lowest, pilot.steepest(lowest), int(sampler.num_burnin_steps)
    )
