"""Automatic settings: fills in every "auto" of the sampler from the pilot's measurements, with its reason.

The law comes first. The localization is a function of model and data alone: with it, flat directions forget within 25
steps of 45 % of the stability limit at the curvature of typical draws; rounded to half octaves, because no trial
measures that curvature better than to some per cent.

Then the step. Its foreseen bias (`lossk.bias`), minibatch noise and discretisation together, stays within 5 % of the
variance of the stiffest and noisiest mode, and its length within 60 % of the stability limit at the steepest of typical
draws (one in a thousand: a trained network is several times as steep there as at w*). Minibatch size and control
variate are those with which flat directions forget at the least cost.

Flat directions, which only the localization pulls back, are the slowest: they forget at rate eps gamma / 2 per step.
Burn-in takes them to 99 % of their stationary variance. A trial chain (trial.py) checks the rest and spaces the draws.
"""

from __future__ import annotations

import dataclasses
import math

from lossk.bias import BIAS_BUDGET, STEEPEST_BUDGET, longest_step
from lossk.pilot import Pilot, batch_factor
from lossk.settings import FEWEST_BATCH
from lossk.sgld import AVERAGED, EULER, SGLD
from lossk.task import Task

STABILITY_BUDGET = 0.6  # eps a / 4 at typical draws; at 1 the chain is unstable
LAW_SHARE, LAW_STEPS = 0.45, 25  # the law: at that eps a / 4 of a typical draw, flat directions forget in so many steps
LAG1_TARGET = math.exp(-1.0)
BURNIN_TARGET = 0.99
STEPS_CAP = 500  # between draws
BURNIN_CAP = 20_000
GRADIENT_PASSES = 3.0  # of a gradient, in forward passes
STEP_FLOPS = 5e6  # that a step takes besides its passes, for the Python around it
ALIKE = 1.1  # times the least cost: within that, less bias decides


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
    step = _choose_step(sampler, pilot, localization, num_train, task.num_weights, limits)
    lr, controlled = step.lr, step.controlled
    reasons: list[str] = []
    if sampler.n_beta is None:
        reasons.append(
            f"n_beta = {pilot.n_beta:.4g}: n / ln n of the {task.loss.num_terms(num_train)} training {task.loss.unit}"
        )
    if sampler.localization == "auto":
        reasons.append(f"localization = {localization:.4g}: {why_local}")
    if sampler.lr == "auto":
        reasons.append(f"lr = {lr:.3g}: {step.why}")
    if sampler.batch_size == "auto" and step.batch > min(FEWEST_BATCH, num_train):
        reasons.append(f"batch_size = {step.batch}: a minibatch of {FEWEST_BATCH} would hold lr at {step.fewest:.2g}")
    if sampler.integrator == "auto" and sampler.averaged:
        reasons.append(f"integrator = {AVERAGED}: noise averaged over two steps has no bias in a quadratic")
    if sampler.control_variate == "auto" and controlled:
        reasons.append(f"control_variate = True: plain noise would hold lr at {step.plain:.2g}; a step costs double")

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
        batch_size=step.batch if sampler.batch_size == "auto" else sampler.batch_size,
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
    return STABILITY_BUDGET if sampler.averaged else BIAS_BUDGET


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


@dataclasses.dataclass(frozen=True)
class Step:
    """A step, and at what price."""

    lr: float
    batch: int
    controlled: bool
    cost: float  # forward passes for flat directions to forget, up to a factor
    noise: float  # minibatch noise over injected noise
    why: str
    plain: float = math.nan  # lr without the control variate
    fewest: float = math.nan  # lr with the smallest minibatch


def _choose_step(
    sampler: SGLD, pilot: Pilot, localization: float, num_train: int, num_weights: int, limits: Limits
) -> Step:
    """The cheapest of the minibatch sizes, with and without a control variate, that are to be chosen from."""
    overhead = STEP_FLOPS / (2 * num_weights)  # in forward passes, of at least two flops a weight
    steps: dict[tuple[int, bool], Step] = {}
    for batch in batches(sampler.batch_size, num_train):
        here = dataclasses.replace(pilot, batch_factor=batch_factor(num_train, batch))
        for controlled in _controls(sampler, batch < num_train):
            lr, why = _longest(sampler, here, localization, controlled, limits)
            noise = here.noise_per_lr(controlled, localization) * sampler.gain
            passes = GRADIENT_PASSES * batch * (2 if controlled and batch < num_train else 1)
            steps[batch, controlled] = Step(lr, batch, controlled, (overhead + passes) / lr, lr * noise, why)
    least = min(step.cost for step in steps.values())
    best = min(
        (step for step in steps.values() if step.cost <= ALIKE * least), key=lambda step: (step.noise, step.cost)
    )
    fewest = next(iter(steps.values())).lr
    plain = steps.get((best.batch, False), best).lr
    return dataclasses.replace(best, plain=plain, fewest=fewest)


def batches(batch_size: int | str | None, num_train: int) -> list[int]:
    """The minibatch sizes to choose from: one that is given, or 256, 512, ... and all samples."""
    if batch_size != "auto":
        return [num_train if batch_size is None else min(int(batch_size), num_train)]
    sizes = []
    size = FEWEST_BATCH
    while size < num_train:
        sizes.append(size)
        size *= 2
    return [*sizes, num_train]


def _controls(sampler: SGLD, minibatches: bool) -> tuple[bool, ...]:
    if sampler.control_variate != "auto":
        return (bool(sampler.control_variate),)
    return (False, True) if sampler.lr == "auto" and minibatches else (False,)


def _longest(
    sampler: SGLD, pilot: Pilot, localization: float, controlled: bool, limits: Limits
) -> tuple[float, str]:  # fmt: skip
    """(lr, why). Budgets are kept at the preconditioner's largest gain: flat directions have it: V is small there."""
    if sampler.lr != "auto":
        return float(sampler.lr), ""
    gain = sampler.gain
    stiffest, noise = pilot.stiffest(localization), pilot.noise_per_lr(controlled, localization)
    stable = 4 * step_budget(sampler) / stiffest if stiffest > 0 else math.inf
    safe = 4 * STEEPEST_BUDGET / pilot.steepest(localization) if stiffest > 0 else math.inf
    unbiased = longest_step(stiffest, noise, BIAS_BUDGET, averaged=sampler.averaged)
    lr = min(stable, unbiased, safe)
    if not math.isfinite(lr):
        raise ValueError("lr='auto' needs a loss with curvature or localization > 0; give lr= as a number")
    if lr == safe < stable:
        why = f"{STEEPEST_BUDGET:.0%} of the stability limit at the steepest draw of a thousand"
    elif lr == stable:
        why = f"{step_budget(sampler):.0%} of the stability limit at curvature {stiffest:.3g}"
    else:
        why = f"foreseen bias {BIAS_BUDGET:.0%} of a variance (stability alone would allow {stable / gain:.2g})"
    if gain != 1.0:
        why += f", at the preconditioner's largest gain {gain:.3g}"
    lr /= gain
    return (lr, why) if lr <= limits.lr else (limits.lr, "a longer step made the trial chain explode")
