"""Automatic settings: fills in every "auto" of the sampler from the pilot's measurements, with its reason.

The law comes first. The localization is a function of model and data alone: with it, flat directions forget within 25
steps of 45 % of the stability limit at the curvature of typical draws; rounded to half octaves, because no trial
measures that curvature better than to some per cent.

Then the step. Its foreseen bias (`lossk.diagnostics.bias`), minibatch noise and discretisation together, stays within
5 % of the variance of the stiffest and noisiest mode, and its length within 60 % of the stability limit at the steepest
of typical draws (one in a thousand: a trained network is several times as steep there as at w*). Minibatch size and
control variate are those with which flat directions forget at the least cost.

Flat directions, which only the localization pulls back, are the slowest: they forget at rate eps gamma / 2 per step.
Burn-in takes them to 99 % of their stationary variance. A trial chain (trial.py) checks the rest and spaces the draws.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from lossk.pilot.pilot import Pilot
from lossk.pilot.step_choice import Step, choose_step
from lossk.samplers.sgld import AVERAGED, EULER, SGLD
from lossk.settings import FEWEST_BATCH
from lossk.task.task import Task

LAW_SHARE, LAW_STEPS = 0.45, 25  # the law: at that eps a / 4 of a typical draw, flat directions forget in so many steps
LAG1_TARGET = math.exp(-1.0)
BURNIN_TARGET = 0.99
STEPS_CAP = 500  # between draws
BURNIN_CAP = 20_000


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a trial chain has taught the choice: bounds that the pilot at w* could not know."""

    localization: float = 0.0  # at least this, or the training loss rises too far
    why_localization: str = "keeps the rise of the training loss within its bound"
    most: float = math.inf  # localization at most this, in a trial: nearer to w* it may be less steep
    lr: float = math.inf  # at most this, or the chain explodes: the step is shortened, the law stays
    burnin: int = 1  # times the burn-in of flat directions, until the losses plateau


def choose_settings(
    sampler: SGLD, pilot: Pilot, task: Task, *, num_train: int, limits: Limits | None = None
) -> tuple[SGLD, list[str]]:
    """Fill in every "auto"; returns the resolved sampler and one line "name = value: reason" per choice."""
    limits = limits or Limits()
    localization, why_local = _choose_law(sampler, pilot, limits)
    step = None
    if sampler.lr == "auto":
        step = choose_step(
            sampler, pilot, localization, num_train=num_train, num_weights=task.num_weights, most=limits.lr,
            exact=task.precision is None,
        )  # fmt: skip
    reasons: list[str] = []
    if sampler.n_beta is None:
        reasons.append(
            f"n_beta = {pilot.n_beta:.4g}: n / ln n of the {task.loss.num_terms(num_train)} training {task.loss.unit}"
        )
    if sampler.localization == "auto":
        reasons.append(f"localization = {localization:.4g}: {why_local}")
    if step is not None:
        reasons += _reasons_of_step(sampler, step, num_train)
    if sampler.integrator == "auto" and sampler.averaged:
        reasons.append(f"integrator = {AVERAGED}: noise averaged over two steps has no bias in a quadratic")

    lr = float(sampler.lr) if step is None else step.lr
    pull = lr * sampler.gain * localization
    if pull <= 0 and "auto" in (sampler.num_burnin_steps, sampler.num_steps_bw_draws):
        raise ValueError(
            "num_burnin_steps and num_steps_bw_draws must be numbers when localization is 0: flat directions then have "
            f"no stationary spread to burn in to, got {sampler.num_burnin_steps!r} and {sampler.num_steps_bw_draws!r}"
        )
    if sampler.num_burnin_steps != "auto":
        burnin = int(sampler.num_burnin_steps)
    else:
        burnin = min(limits.burnin * math.ceil(-math.log(1 - BURNIN_TARGET) / pull), BURNIN_CAP)
        reached = 1 - abs(1 - pull / 2) ** (2 * burnin)
        reasons.append(f"num_burnin_steps = {burnin}: flat directions reach {reached:.1%} of their stationary variance")
    if sampler.num_steps_bw_draws != "auto":
        thinning = int(sampler.num_steps_bw_draws)
    else:
        thinning = max(1, min(math.ceil(-2 * math.log(LAG1_TARGET) / pull), STEPS_CAP))
        lag1 = float(abs(1 - pull / 2) ** thinning)
        reasons.append(f"num_steps_bw_draws = {thinning}: flat directions keep autocorrelation {lag1:.2f}")
    resolved = dataclasses.replace(
        sampler,
        lr=lr,
        **_made(sampler, step),
        n_beta=pilot.n_beta,
        localization=localization,
        num_burnin_steps=burnin,
        num_steps_bw_draws=thinning,
        integrator=AVERAGED if sampler.averaged else EULER,
    )
    return resolved, reasons


def _made(sampler: SGLD, step: Step | None) -> dict[str, Any]:
    """How the steps are made, with every "auto" filled in."""
    batch = step.way.batch if step is not None else FEWEST_BATCH
    controlled, strength = (step.way.controlled, step.strength or False) if step is not None else (False, False)
    return {
        "batch_size": batch if sampler.batch_size == "auto" else sampler.batch_size,
        "control_variate": controlled if sampler.control_variate == "auto" else sampler.control_variate,
        "noise_correction": strength if sampler.noise_correction == "auto" else sampler.noise_correction,
    }


def _reasons_of_step(sampler: SGLD, step: Step, num_train: int) -> list[str]:
    reasons, way = [f"lr = {step.lr:.3g}: {step.why}"], step.way
    if sampler.batch_size == "auto" and way.batch > min(FEWEST_BATCH, num_train):
        reasons.append(f"batch_size = {way.batch}: a minibatch of {FEWEST_BATCH} would hold lr at {step.fewest:.2g}")
    if sampler.control_variate == "auto" and way.controlled:
        reasons.append(f"control_variate = True: plain noise would hold lr at {step.plain:.2g}; a step costs double")
    if sampler.noise_correction == "auto" and step.strength:
        reasons.append(
            f"noise_correction = {step.strength:.3g}: uncorrected noise would hold lr at {step.plain:.2g}; one more "
            "forward pass of a minibatch"
        )
    return reasons


def _choose_law(sampler: SGLD, pilot: Pilot, limits: Limits) -> tuple[float, str]:
    """(localization, why): gamma = (n_beta h + gamma) / (2 B steps), h the curvature of typical draws at gamma."""
    if sampler.localization != "auto":
        return float(sampler.localization), ""
    per = pilot.n_beta / (2 * LAW_SHARE * LAW_STEPS - 1)
    fixed, drawn = per * pilot.curvature, per * pilot.steepening
    if pilot.drawn_localization:  # what is found at draws more than at w* goes as 1 / gamma
        found = (fixed + math.sqrt(fixed**2 + 4 * drawn * pilot.drawn_localization)) / 2
    else:
        found = fixed + drawn
    found, why = min(to_half_octave(found), limits.most), "1/22 of the curvature of typical draws, to half octaves"
    if found < limits.localization:
        return limits.localization, limits.why_localization
    return (found, why) if found > 0 else (1.0, "no curvature to choose it by")


def to_half_octave(value: float, *, up: bool = False) -> float:
    """The nearest power of the square root of two, or the next above; 0 stays."""
    if value <= 0:
        return 0.0
    octaves = 2 * math.log2(value)
    return float(2 ** ((math.ceil(octaves - 1e-9) if up else round(octaves)) / 2))
