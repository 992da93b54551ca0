"""Every "auto" of any sampler: whether a pilot is needed, and what follows from it."""

from __future__ import annotations

import dataclasses
import math

from lossk import modes
from lossk.baoab import BAOAB
from lossk.chain import Surroundings
from lossk.gaussian import Gaussian
from lossk.pilot import Pilot, default_n_beta, run_pilot
from lossk.samplers import Sampler
from lossk.sgld import SGLD
from lossk.timings import Progress
from lossk.trial import settle
from lossk.tune import BURNIN_CAP, BURNIN_TARGET, LAG1_TARGET, NOISE_BUDGET, STABILITY_BUDGET, STEPS_CAP

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
    task, train, seed = around.task, around.train, around.seed
    if isinstance(sampler, Gaussian):
        return sampler, None, []
    reasons: list[str] = []
    if isinstance(sampler, SGLD):
        pilot = run_pilot(task, train, sampler, seed=seed, run_passes=run_passes)
        resolved, pilot, reasons = settle(sampler, pilot, around, num_probe=num_probe, bar=bar)
        if sampler.lr == "auto":
            reasons += _praise_of_averaging(resolved, pilot) + _praise_of_momentum(resolved, pilot)
        return resolved, pilot, reasons
    if sampler.n_beta is None:
        terms = task.loss.num_terms(len(train))
        n_beta = default_n_beta(terms)
        sampler = dataclasses.replace(sampler, n_beta=n_beta)
        reasons.append(f"n_beta = {n_beta:.4g}: n / ln n of the {terms} training {task.loss.unit}")
    if not sampler.has_auto:
        return sampler, None, reasons
    # The law is that of SGLD's default, whatever the sampler.
    alike = SGLD(
        n_beta=sampler.n_beta, localization=sampler.localization, batch_size=getattr(sampler, "batch_size", 256),
        params=sampler.params,
    )  # fmt: skip
    if isinstance(sampler, BAOAB) and sampler.control_variate:
        alike = dataclasses.replace(alike, control_variate=True)
    pilot = run_pilot(task, train, alike, seed=seed)
    # How steep it is away from w*, and what noise a control variate leaves there, only a trial chain can say.
    unknown = isinstance(sampler, BAOAB) and sampler.step_size == "auto"
    if sampler.localization == "auto" or (unknown and sampler.localization > 0):
        sgld, pilot, whys = settle(alike, pilot, around, num_probe=num_probe, bar=bar)
        sampler = dataclasses.replace(sampler, localization=float(sgld.localization))
        reasons += [why for why in whys if why.startswith("localization")]
    if isinstance(sampler, BAOAB):
        sampler, more = _choose_baoab(sampler, pilot)
        reasons += more
    return sampler, pilot, reasons


def _praise_of_averaging(sampler: SGLD, pilot: Pilot) -> list[str]:
    """A line, if averaged noise would allow a much longer step: where discretisation, not minibatch noise, binds."""
    if sampler.averaged or sampler.preconditioner is not None or sampler.measure_acceptance:
        return []
    shares = (pilot.stability_share(sampler) / STABILITY_BUDGET, pilot.noise_ratio(sampler) / NOISE_BUDGET)
    if max(shares) <= 0 or max(shares) * WORTH_SAYING > 1:
        return []
    return [
        "elsewhere = averaged noise: SGLD(integrator='leimkuhler-matthews') would take steps "
        f"{1 / max(shares):.1f} times as long, without bias in a quadratic"
    ]


def _praise_of_momentum(sampler: SGLD, pilot: Pilot) -> list[str]:
    """A line, if kinetic Langevin dynamics would forget flat directions with far fewer gradients (in a quadratic)."""
    lowest = float(sampler.localization)
    highest = pilot.n_beta * pilot.steepest(lowest) + lowest
    if lowest <= 0 or highest <= 0:
        return []
    h = 1.0 / math.sqrt(highest)
    friction = modes.choose_friction(h, lowest, highest, STEPS_CAP)
    theirs = 2 * modes.steps_to_forget(h, friction, lowest, highest, LAG1_TARGET, STEPS_CAP)
    ours = (2 if sampler.control_variate else 1) * 2.0 / (float(sampler.lr) * sampler.gain * lowest)
    if ours < WORTH_SAYING * theirs:
        return []
    return [f"elsewhere = BAOAB: lossk.BAOAB() would forget flat directions in {theirs} gradients, not {ours:.0f}"]


def momentum_noise_ratio(sampler: Sampler, pilot: Pilot | None) -> float | None:
    """Minibatch noise of BAOAB's kicks over its thermostat's, in its worst direction; None where there are none."""
    if not isinstance(sampler, BAOAB) or pilot is None:
        return None
    h = float(sampler.step_size)
    lost = 1.0 - math.exp(-2.0 * float(sampler.friction) * h)
    return 4.0 * h * h * pilot.noise_per_lr(sampler.control_variate, float(sampler.localization)) / lost


def _choose_baoab(sampler: BAOAB, pilot: Pilot) -> tuple[BAOAB, list[str]]:
    """h from the largest curvature; friction, burn-in and spacing from the exact linear map (`lossk.modes`)."""
    reasons: list[str] = []
    lowest = float(sampler.localization)
    highest = pilot.n_beta * pilot.steepest(lowest) + lowest
    if lowest <= 0:
        raise ValueError(
            "step_size, friction, num_burnin_steps and num_steps_bw_draws must be numbers when localization is 0: flat "
            "directions then have no stationary spread to choose them by"
        )
    if sampler.step_size == "auto":
        h, why = 1.0 / math.sqrt(highest), f"h^2 a_max = 1 at curvature a_max = {highest:.3g} (4 is the limit)"
        noise = pilot.noise_per_lr(sampler.control_variate, lowest)
        # Minibatch noise of a kick over the thermostat's: h^2 4 noise / (1 - c^2), with friction about 2 sqrt(gamma).
        if noise > 0 and math.sqrt(lowest) * NOISE_BUDGET / noise < h:
            h = float(math.sqrt(lowest) * NOISE_BUDGET / noise)
            why = f"gradient-noise budget {NOISE_BUDGET:.2g}"
        reasons.append(f"step_size = {h:.3g}: {why}")
    else:
        h = float(sampler.step_size)
        if h * h * highest >= 4.0:
            raise ValueError(
                f"step_size must be less than 2 / sqrt(a_max) = {2 / math.sqrt(highest):.3g} at the measured curvature "
                f"a_max = {highest:.3g}, got {h:.3g}"
            )
    if sampler.friction == "auto":
        friction = modes.choose_friction(h, lowest, highest, STEPS_CAP)
        reasons.append(
            f"friction = {friction:.3g}: {friction / math.sqrt(lowest):.2g} sqrt(localization), where the slowest mode "
            "forgets soonest"
        )
    else:
        friction = float(sampler.friction)
    if sampler.num_burnin_steps == "auto":
        burnin = modes.steps_to_spread(h, friction, lowest, highest, BURNIN_TARGET, BURNIN_CAP)
        reached = modes.spread(h, friction, lowest, highest, burnin)
        reasons.append(
            f"num_burnin_steps = {burnin}: the slowest mode reaches {reached:.0%} of its stationary variance"
        )
    else:
        burnin = int(sampler.num_burnin_steps)
    if sampler.num_steps_bw_draws == "auto":
        thinning = modes.steps_to_forget(h, friction, lowest, highest, LAG1_TARGET, STEPS_CAP)
        lag1 = modes.lag_correlation(h, friction, lowest, highest, thinning)
        reasons.append(
            f"num_steps_bw_draws = {thinning}: the slowest mode keeps autocorrelation {lag1:.2f} between draws"
        )
    else:
        thinning = int(sampler.num_steps_bw_draws)
    resolved = dataclasses.replace(
        sampler, step_size=h, friction=friction, num_burnin_steps=burnin, num_steps_bw_draws=thinning
    )
    return resolved, reasons
