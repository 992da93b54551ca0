"""BAOAB's automatic settings, from the pilot's measurements and the exact linear map of its modes (`pilot.modes`)."""

from __future__ import annotations

import dataclasses
import math

from lossk.diagnostics.bias import BIAS_BUDGET
from lossk.pilot import modes
from lossk.pilot.automatic import BURNIN_CAP, BURNIN_TARGET, LAG1_TARGET, STEPS_CAP
from lossk.pilot.pilot import Pilot, batch_factor
from lossk.pilot.step_choice import Way, batches
from lossk.samplers.baoab import BAOAB
from lossk.settings import FEWEST_BATCH, minibatch_of


def longest_step(pilot: Pilot, lowest: float, controlled: bool, friction: float | None = None) -> tuple[float, str]:
    """h at a localization, and why no longer; `friction` as given, or else as it will be chosen."""
    highest = pilot.steepest(lowest)
    h, why = 1.0 / math.sqrt(highest), f"h^2 a_max = 1 at curvature a_max = {highest:.3g} (4 is the limit)"
    noise = pilot.noise_per_lr(controlled, lowest)
    for _ in range(4):  # the friction that is best depends a little on h
        damping = modes.choose_friction(h, lowest, highest, STEPS_CAP) if friction is None else friction
        excess = kick_noise(h, damping, noise) / BIAS_BUDGET
        if excess <= 1.001:
            break
        h, why = h / excess, f"foreseen bias {BIAS_BUDGET:.0%} of a variance"
    return h, why


def kick_noise(h: float, friction: float, noise: float) -> float:
    """Minibatch noise of a kick over the thermostat's, in its worst direction; `noise` is `Pilot.noise_per_lr`."""
    return 4.0 * h * h * noise / (1.0 - math.exp(-2.0 * friction * h))


def steps_to_forget(pilot: Pilot, lowest: float, controlled: bool) -> int:
    """Of the slowest mode, at the longest step of a localization and its best friction."""
    h, _ = longest_step(pilot, lowest, controlled)
    highest = pilot.steepest(lowest)
    friction = modes.choose_friction(h, lowest, highest, STEPS_CAP)
    return modes.steps_to_forget(h, friction, lowest, highest, LAG1_TARGET, STEPS_CAP)


def choose_batch(sampler: BAOAB, pilot: Pilot, num_train: int, num_weights: int) -> int:
    """The minibatch size at which the slowest mode forgets at the least cost."""
    lowest, best, least = float(sampler.localization), 0, math.inf
    for batch in batches(sampler.batch_size, num_train):
        here = dataclasses.replace(pilot, batch_factor=batch_factor(num_train, batch))
        price = Way(batch, sampler.control_variate, corrected=False).cost(num_train, num_weights)
        cost = price * steps_to_forget(here, lowest, sampler.control_variate)
        if cost < least:
            best, least = batch, cost
    return best


def choose_baoab(sampler: BAOAB, pilot: Pilot, num_train: int, num_weights: int) -> tuple[BAOAB, Pilot, list[str]]:
    """h from the largest curvature; friction, burn-in and spacing from the exact linear map (`lossk.pilot.modes`).

    Returns:
        The resolved sampler, the pilot with its minibatches, and why.
    """
    reasons: list[str] = []
    lowest = float(sampler.localization)
    highest = pilot.steepest(lowest)
    if lowest <= 0:
        raise ValueError(
            "step_size, friction, num_burnin_steps and num_steps_bw_draws must be numbers when localization is 0: flat "
            "directions then have no stationary spread to choose them by"
        )
    if sampler.batch_size == "auto":
        batch = choose_batch(sampler, pilot, num_train, num_weights)
        sampler = dataclasses.replace(sampler, batch_size=batch)
        if batch > min(FEWEST_BATCH, num_train):
            reasons.append(f"batch_size = {batch}: minibatch noise then costs least")
    pilot = dataclasses.replace(
        pilot, batch_factor=batch_factor(num_train, minibatch_of(sampler.batch_size, num_train))
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
    return resolved, pilot, reasons
