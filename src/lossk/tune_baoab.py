"""BAOAB's automatic settings, from the pilot's measurements and the exact linear map of its modes (`lossk.modes`)."""

from __future__ import annotations

import dataclasses
import math

from lossk import modes
from lossk.baoab import BAOAB
from lossk.pilot import Pilot
from lossk.tune import AFFORDABLE_STEPS, BURNIN_CAP, BURNIN_TARGET, LAG1_TARGET, NOISE_BUDGET, STEPS_CAP

FARTHEST = 100.0  # times the localization that the budgets of SGLD ask for


def longest_step(pilot: Pilot, lowest: float, controlled: bool, friction: float | None = None) -> tuple[float, str]:
    """h at a localization, and why no longer; `friction` as given, or else as it will be chosen."""
    highest = pilot.stiffest(lowest)
    h, why = 1.0 / math.sqrt(highest), f"h^2 a_max = 1 at curvature a_max = {highest:.3g} (4 is the limit)"
    noise = pilot.noise_per_lr(controlled, lowest)
    for _ in range(4):  # the friction that is best depends a little on h
        damping = modes.choose_friction(h, lowest, highest, STEPS_CAP) if friction is None else friction
        excess = kick_noise(h, damping, noise) / NOISE_BUDGET
        if excess <= 1.001:
            break
        h, why = h / excess, f"gradient-noise budget {NOISE_BUDGET:.2g}"
    return h, why


def kick_noise(h: float, friction: float, noise: float) -> float:
    """Minibatch noise of a kick over the thermostat's, in its worst direction; `noise` is `Pilot.noise_per_lr`."""
    return 4.0 * h * h * noise / (1.0 - math.exp(-2.0 * friction * h))


def steps_to_forget(pilot: Pilot, lowest: float, controlled: bool) -> int:
    """Of the slowest mode, at the longest step of a localization and its best friction."""
    h, _ = longest_step(pilot, lowest, controlled)
    highest = pilot.stiffest(lowest)
    friction = modes.choose_friction(h, lowest, highest, STEPS_CAP)
    return modes.steps_to_forget(h, friction, lowest, highest, LAG1_TARGET, STEPS_CAP)


def afford(sampler: BAOAB, pilot: Pilot) -> tuple[BAOAB, list[str]]:
    """With the least localization, from its own on, at which flat directions forget in 25 gradients; why, if another.

    Minibatch noise allows BAOAB a step that goes as localization^1.5.
    """
    gradients = 2 if sampler.control_variate and pilot.batch_factor > 0 else 1
    steps = AFFORDABLE_STEPS // gradients
    if sampler.num_steps_bw_draws != "auto":
        steps = max(steps, int(sampler.num_steps_bw_draws))
    here = lowest = float(sampler.localization)
    while lowest < FARTHEST * here:
        if steps_to_forget(pilot, lowest, sampler.control_variate) <= steps:
            break
        lowest *= 1.05
    why = [f"localization = {lowest:.4g}: flat directions then forget within {steps} steps of {gradients} gradients"]
    return dataclasses.replace(sampler, localization=lowest), why if lowest > here else []


def choose_baoab(sampler: BAOAB, pilot: Pilot) -> tuple[BAOAB, list[str]]:
    """h from the largest curvature; friction, burn-in and spacing from the exact linear map (`lossk.modes`)."""
    reasons: list[str] = []
    lowest = float(sampler.localization)
    highest = pilot.stiffest(lowest)
    if lowest <= 0:
        raise ValueError(
            "step_size, friction, num_burnin_steps and num_steps_bw_draws must be numbers when localization is 0: flat "
            "directions then have no stationary spread to choose them by"
        )
    if sampler.step_size == "auto":
        given = None if sampler.friction == "auto" else float(sampler.friction)
        h, why = longest_step(pilot, lowest, sampler.control_variate, given)
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
