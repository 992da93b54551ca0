"""The cheapest step of a law: its length, its minibatch, and what is done about the minibatch's noise.

Every way to step samples the same law, at the longest step whose foreseen bias (`lossk.diagnostics.bias`) is within 5 %
of the variance of the stiffest and noisiest mode and which is stable at the steepest draws; they differ in what it
costs.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

from lossk.diagnostics.bias import BIAS_BUDGET, STEEPEST_BUDGET, correction_strength, foreseen_bias, longest_step
from lossk.pilot.pilot import Pilot, batch_factor
from lossk.samplers.sgld import SGLD
from lossk.settings import FEWEST_BATCH, minibatch_of

STABILITY_BUDGET = 0.6  # eps a / 4 at typical draws; at 1 the chain is unstable
GRADIENT_PASSES, CORRECTION_PASSES = 3.0, 1.0  # of a gradient and of its noise's correction, in forward passes
STEP_FLOPS = 5e6  # that a step takes besides its passes, for the Python around it
ALIKE = 1.1  # times the least cost: within that, less bias decides
BISECTIONS = 30
EXPLODED = "a longer step made the trial chain explode"


@dataclass(frozen=True)
class Way:
    """How a step is made, its length aside."""

    batch: int  # samples of a minibatch
    controlled: bool  # by a control variate
    corrected: bool  # its noise

    def cost(self, num_train: int, num_weights: int) -> float:
        """Of a step and its noise, in forward passes of one sample, of at least two flops a weight."""
        return STEP_FLOPS / (2 * num_weights) + self.passes(num_train)

    def passes(self, num_train: int) -> float:
        """Of a step, in forward passes of one sample."""
        each = GRADIENT_PASSES + (CORRECTION_PASSES if self.corrected else 0.0)
        return each * (2 if self.controlled and self.batch < num_train else 1) * self.batch


def way_of(sampler: SGLD, num_train: int) -> Way:
    """That of a resolved sampler."""
    batch = minibatch_of(sampler.batch_size, num_train)
    return Way(batch, sampler.control_variate is True, sampler.correction > 0)


@dataclass(frozen=True)
class Step:
    """A way with its longest step."""

    way: Way
    lr: float
    strength: float  # of the noise correction; 0 is none
    bias: float  # foreseen, of the worst direction
    cost: float  # forward passes for flat directions to forget, up to a factor
    why: str
    plain: float = math.nan  # lr of the same minibatch, neither controlled nor corrected
    fewest: float = math.nan  # lr with the smallest minibatch


def step_budget(sampler: SGLD) -> float:
    """The largest eps a_max / 4."""
    return STABILITY_BUDGET if sampler.averaged else BIAS_BUDGET


def choose_step(
    sampler: SGLD, pilot: Pilot, localization: float, *, num_train: int, num_weights: int, most: float, exact: bool
) -> Step:
    """The cheapest of the ways that the sampler's settings leave open, where its lr is to be chosen.

    Args:
        most: lr at most this.
        exact: passes are float32, so that a correction costs one more and no other ones.

    Raises:
        ValueError: nothing bounds a step.
    """
    steps: dict[Way, Step] = {}
    for way in ways(sampler, num_train, exact=exact):
        here = dataclasses.replace(pilot, batch_factor=batch_factor(num_train, way.batch))
        step = _longest(sampler, here, localization, way, way.cost(num_train, num_weights))
        if step.lr > most:
            step = dataclasses.replace(step, lr=most, cost=step.cost * step.lr / most, why=EXPLODED)
        steps[way] = step
    least = min(step.cost for step in steps.values())
    alike = [step for step in steps.values() if step.cost <= ALIKE * least]
    best = min(alike, key=lambda step: (step.bias, step.cost))
    plain = steps.get(Way(best.way.batch, controlled=False, corrected=False), best)
    return dataclasses.replace(best, plain=plain.lr, fewest=next(iter(steps.values())).lr)


def ways(sampler: SGLD, num_train: int, *, exact: bool = True) -> list[Way]:
    """The plain ones first, small minibatches before large ones."""
    control, correction = sampler.control_variate, sampler.noise_correction
    controls = (False, True) if control == "auto" else (bool(control),)
    corrections = (False, True) if correction == "auto" else (sampler.correction > 0,)
    if correction == "auto" and (sampler.preconditioner is not None or not exact):
        corrections = (False,)
    found = []
    for corrected, controlled, batch in itertools.product(
        corrections, controls, batches(sampler.batch_size, num_train)
    ):
        if batch == num_train:  # no noise to do anything about
            found.append(Way(batch, control is True, sampler.correction > 0))
        elif batch > 1 or not corrected:
            found.append(Way(batch, controlled, corrected))
    return list(dict.fromkeys(found))


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


def _longest(sampler: SGLD, pilot: Pilot, localization: float, way: Way, cost: float) -> Step:
    """Budgets are kept at the preconditioner's largest gain: flat directions have it, for V is small there."""
    gain, averaged = sampler.gain, sampler.averaged
    stiffest, noise = pilot.stiffest(localization), pilot.noise_per_lr(way.controlled, localization)
    if not stiffest > 0:
        raise ValueError("lr='auto' needs a loss with curvature or localization > 0; give lr= as a number")
    stable, safe = 4 * step_budget(sampler) / stiffest, 4 * STEEPEST_BUDGET / pilot.steepest(localization)
    lr = min(stable, safe)

    def foreseen(lr: float) -> tuple[float, float]:
        """(strength, bias)"""
        share, ratio = lr * stiffest / 4, lr * noise
        if way.corrected and sampler.noise_correction == "auto" and ratio > 0:
            return correction_strength(share, ratio, averaged=averaged)
        strength = sampler.correction if way.corrected else 0.0
        return strength, foreseen_bias(share, ratio, averaged=averaged, alpha=strength)

    why = f"{step_budget(sampler):.0%} of the stability limit at curvature {stiffest:.3g}"
    if safe < stable:
        why = f"{STEEPEST_BUDGET:.0%} of the stability limit at the steepest draw of a thousand"
    if foreseen(lr)[1] > BIAS_BUDGET * (1 + 1e-9):
        why = f"foreseen bias {BIAS_BUDGET:.0%} of a variance (stability alone would allow {lr / gain:.2g})"
        if way.corrected:
            lr = _bisect(lambda lr: foreseen(lr)[1], lr)
        else:
            lr = longest_step(stiffest, noise, BIAS_BUDGET, averaged=averaged)
    if gain != 1.0:
        why += f", at the preconditioner's largest gain {gain:.3g}"
    strength, bias = foreseen(lr)
    return Step(way, lr / gain, strength, bias, cost * gain / lr, why)


def _bisect(bias: Callable[[float], float], most: float) -> float:
    """The longest step within the budget, of a bias that grows with it."""
    low, high = 0.0, most
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if bias(middle) <= BIAS_BUDGET else (low, middle)
    return low
