"""Automatic settings: fills in every "auto" of the sampler from the pilot's measurements, with its reason.

Budgets (relative excess variance of a mode of curvature a is eps a / 4; minibatch noise over injected noise in its
worst direction is eps n_beta^2 f lambda_max(Cov g) / 4 with f = (n - m) / (m (n - 1))):

    discretisation   eps (n_beta h_max + gamma) / 4 <= 0.05
    gradient noise   eps n_beta^2 f lambda_max / 4  <= 0.25

h_max and lambda_max are the larger of what they are at w* and at typical draws of the trial chain, where a trained
network is several times as steep. With averaged noise (`integrator="leimkuhler-matthews"`, what "auto" means) the bias
is of second order, and none in a quadratic: there eps a_max / 4 is kept below 0.45, where 1 is unstable.

Flat directions, which only the localization pulls back, are the slowest: they forget at rate eps gamma / 2 per step.
Burn-in takes them to 99 % of their stationary variance. The localization is the least at which they forget within 25
steps (50 of Euler's), the affordable time; a trial chain (trial.py) then checks the rest and spaces the draws.
"""

from __future__ import annotations

import dataclasses
import math

from lossk.pilot import Pilot
from lossk.sgld import AVERAGED, EULER, SGLD
from lossk.task import Task

DISCRETISATION_BUDGET = 0.05
STABILITY_BUDGET = 0.45  # eps a_max / 4 with averaged noise; at 1 the chain is unstable
NOISE_BUDGET = 0.25
LAG1_TARGET = math.exp(-1.0)
BURNIN_TARGET = 0.99
AFFORDABLE_STEPS = 25  # in which a flat direction shall forget, when localization is free to be chosen
AFFORDABLE_EULER = 50  # of Euler's step, which is shorter
STEPS_CAP = 500  # between draws, when it is not
BURNIN_CAP = 20_000
CONTROL_PAYS = 2.0  # a control variate doubles the cost of a step, so lr must more than double


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a trial chain has taught the choice: bounds that the pilot at w* could not know."""

    localization: float = 0.0  # at least this, or the training loss rises too far
    why_localization: str = "keeps the rise of the training loss within its bound"
    most: float = math.inf  # localization at most this, in a trial: nearer to w* it may be less steep
    lr: float = math.inf  # at most this, or the chain explodes
    burnin: int = 1  # times the burn-in of flat directions, until the losses plateau


def choose_settings(
    sampler: SGLD, pilot: Pilot, task: Task, *, num_train: int, limits: Limits | None = None
) -> tuple[SGLD, list[str]]:
    """Fill in every "auto"; returns the resolved sampler and one line "name = value: reason" per choice."""
    limits = limits or Limits()
    controlled = _choose_control(sampler, pilot, limits)
    localization, lr, why_local, why_lr = _choose_law(sampler, pilot, controlled, limits)
    reasons: list[str] = []
    if sampler.n_beta is None:
        reasons.append(
            f"n_beta = {pilot.n_beta:.4g}: n / ln n of the {task.loss.num_terms(num_train)} training {task.loss.unit}"
        )
    if sampler.localization == "auto":
        reasons.append(f"localization = {localization:.4g}: {why_local}")
    if sampler.lr == "auto":
        reasons.append(f"lr = {lr:.3g}: {why_lr}")
    if sampler.integrator == "auto" and sampler.averaged:
        reasons.append(f"integrator = {AVERAGED}: noise averaged over two steps has no bias in a quadratic")
    if sampler.control_variate == "auto" and controlled:
        _, plain, _, _ = _choose_law(sampler, pilot, False, limits)
        reasons.append(
            f"control_variate = True: plain minibatch noise would hold lr at {plain:.2g}; a step costs double"
        )

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
        n_beta=pilot.n_beta,
        localization=localization,
        num_burnin_steps=burnin,
        num_steps_bw_draws=thinning,
        integrator=AVERAGED if sampler.averaged else EULER,
        control_variate=controlled,
        noise_correction=sampler.noise_correction != "auto" and sampler.noise_correction,
    )
    return resolved, reasons


def step_budget(sampler: SGLD) -> float:
    """The largest eps a_max / 4."""
    return STABILITY_BUDGET if sampler.averaged else DISCRETISATION_BUDGET


def affordable_steps(sampler: SGLD) -> int:
    """In which flat directions shall forget; as many as the user wants between draws, if those are more."""
    steps = AFFORDABLE_STEPS if sampler.averaged else AFFORDABLE_EULER
    wanted = sampler.num_steps_bw_draws
    return steps if wanted == "auto" else max(int(wanted), steps)


def _choose_control(sampler: SGLD, pilot: Pilot, limits: Limits) -> bool:
    if sampler.control_variate != "auto":
        return bool(sampler.control_variate)
    if sampler.lr != "auto" or pilot.batch_factor == 0.0:
        return False
    with_it, without = (_choose_law(sampler, pilot, controlled, limits)[1] for controlled in (True, False))
    return with_it > CONTROL_PAYS * without


def _choose_law(sampler: SGLD, pilot: Pilot, controlled: bool, limits: Limits) -> tuple[float, float, str, str]:
    """(localization, lr, why the one, why the other). Budgets are kept at the preconditioner's largest gain.

    Flat directions have that gain: there V is small. The least localization that mixes within `steps` has
    lr gamma = 2 / steps with lr at the tighter of its two bounds, so
    gamma = 2 / (steps noise_lr) or gamma = stiff / (2 B steps - 1), with B the step's budget.
    """
    gain, steps = sampler.gain, affordable_steps(sampler)
    if sampler.localization != "auto":
        localization, why_local = float(sampler.localization), ""
    else:
        localization = min(_mixing_localization(sampler, pilot, controlled, steps, limits), limits.most)
        why_local = f"flat directions then forget within {steps} steps"
        if localization < limits.localization:
            localization, why_local = limits.localization, limits.why_localization
        elif localization == 0.0:
            localization, why_local = 1.0, "no curvature or gradient noise to choose it by"
    if sampler.lr != "auto":
        return localization, float(sampler.lr), why_local, ""
    stiffest = pilot.stiffest(localization)
    noise = pilot.noise_per_lr(controlled, localization)
    noise_lr = NOISE_BUDGET / noise if noise > 0 else math.inf
    step_lr = 4 * step_budget(sampler) / stiffest if stiffest > 0 else math.inf
    lr = min(step_lr, noise_lr)
    if not math.isfinite(lr):
        raise ValueError("lr='auto' needs a loss with curvature or localization > 0; give lr= as a number")
    if step_lr <= noise_lr:
        share, rule = f"{step_budget(sampler):.0%}", f"at curvature {stiffest:.3g}"
        why_lr = (
            f"{share} of the stability limit {rule}" if sampler.averaged else f"discretisation budget {share} {rule}"
        )
    else:
        why_lr = f"gradient-noise budget {NOISE_BUDGET:.2g} (discretisation alone would allow {step_lr / gain:.2g})"
    if gain != 1.0:
        why_lr += f", at the preconditioner's largest gain {gain:.3g}"
    lr /= gain
    if lr > limits.lr:
        lr, why_lr = limits.lr, "a longer step made the trial chain explode"
    return localization, lr, why_local, why_lr


def _mixing_localization(sampler: SGLD, pilot: Pilot, controlled: bool, steps: int, limits: Limits) -> float:
    if sampler.lr != "auto":
        return 2.0 / (steps * float(sampler.lr) * sampler.gain)

    def least(per: float, fixed: float, drawn: float) -> float:
        """gamma = per (fixed + drawn gamma_drawn / gamma)."""
        fixed, drawn = per * fixed, per * drawn
        if pilot.drawn_localization:
            return (fixed + math.sqrt(fixed**2 + 4 * drawn * pilot.drawn_localization)) / 2
        return fixed + drawn

    from_step = least(pilot.n_beta / (2 * step_budget(sampler) * steps - 1), pilot.curvature, pilot.steepening)
    if controlled:  # noise per lr is c / gamma: gamma^2 = 2 c / (steps budget)
        from_noise = math.sqrt(2.0 * pilot.noise_per_lr(True, 1.0) / (steps * NOISE_BUDGET))
    else:
        per = pilot.n_beta**2 * pilot.batch_factor / (2.0 * steps * NOISE_BUDGET)
        from_noise = least(per, pilot.gradient_variance, pilot.loudening)
    from_explosion = 2.0 / (steps * limits.lr * sampler.gain) if math.isfinite(limits.lr) else 0.0
    return max(from_step, from_noise, from_explosion)
