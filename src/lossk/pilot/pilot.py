"""The pilot's measurements: the largest curvature of the training loss and the largest gradient variance.

At w*, at typical draws of the trial chain, and at the last draws of the run's own: away from w* a trained network is
severalfold as steep, and its gradients differ up to hundreds of times as much.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lossk.curvature.curvature import gradient_variance, largest_curvature, steepness
from lossk.data.data import Samples
from lossk.diagnostics.bias import foreseen_bias
from lossk.pilot.effort import Effort
from lossk.pilot.vectors import chooses
from lossk.samplers.sgld import SGLD
from lossk.settings import minibatch_of
from lossk.task.task import Task


@dataclass(frozen=True, kw_only=True)
class Pilot:
    """What the pilot measured at w*, and the trial chain at its draws."""

    curvature: float  # h_max, the largest eigenvalue of the Hessian of L_n (0 if there is no positive one)
    gradient_variance: float  # lambda_max(Cov g) over per-sample gradients
    n_beta: float
    batch_factor: float  # f: variance of a minibatch mean over the per-sample variance
    num_samples: int  # training samples used
    control_variance: float | None = None  # lambda_max(Cov(g_i(w) - g_i(w*))) at a typical w of the trial chain
    control_localization: float | None = None  # the trial's
    drawn_curvature: float | None = None  # h_max at typical draws of the trial chain, or of the run, or of both
    drawn_steepest: float | None = None  # h_max at the steepest draw of a thousand
    drawn_localization: float | None = None  # theirs
    drawn_times: int = 0  # draws at which it was measured
    drawn_stably: bool = True  # False: so steep for its step that this may have driven the draws there
    effective_dimension: float | None = None  # in how many directions the data beat the pull at w*
    drawn_variance: float | None = None  # lambda_max(Cov g) likewise

    @property
    def steepening(self) -> float:
        """How much larger the curvature is at typical draws than at w*."""
        return max((self.drawn_curvature or 0.0) - self.curvature, 0.0)

    @property
    def unevenness(self) -> float | None:
        """How much larger the curvature is at the steepest draw of a thousand than at typical ones; None if unknown."""
        if self.drawn_steepest is None or not (self.drawn_curvature or 0.0) > 0:
            return None
        return self.drawn_steepest / float(self.drawn_curvature or 1.0)

    @property
    def loudening(self) -> float:
        """How much larger the gradient variance is at typical draws than at w*."""
        return max((self.drawn_variance or 0.0) - self.gradient_variance, 0.0)

    def typical(self, localization: float) -> float:
        """h_max at typical draws of that localization."""
        return self.curvature + self.steepening * self._moved(localization)

    def steepest_curvature(self, localization: float) -> float:
        """h_max at the steepest of typical draws of that localization: one in a thousand."""
        drawn = self.drawn_curvature if self.drawn_steepest is None else self.drawn_steepest
        excess = max((drawn or 0.0) - self.curvature, 0.0)
        return self.curvature + excess * self._moved(localization)

    def steepest(self, localization: float) -> float:
        """n_beta h + localization there: what a step must be stable for."""
        return self.n_beta * self.steepest_curvature(localization) + localization

    def stiffest(self, localization: float) -> float:
        """a_max = n_beta h_max + localization at typical draws of that localization."""
        return self.n_beta * self.typical(localization) + localization

    def loudest(self, localization: float) -> float:
        """lambda_max(Cov g) at typical draws of that localization."""
        return self.gradient_variance + self.loudening * self._moved(localization)

    def _left(self, localization: float) -> float:
        """lambda_max(Cov(g_i(w) - g_i(w*))) at typical draws of that localization; 0 while it has not been measured."""
        if self.control_variance is None or self.control_localization is None:
            return 0.0
        return self.control_variance * self.control_localization / max(localization, 1e-30)

    def _moved(self, localization: float) -> float:
        """What is found at draws more than at w* goes as their squared distance, 1 / localization.

        Not relied upon where the draws that were measured were not the law's.
        """
        if self.drawn_localization and self.drawn_stably:
            return self.drawn_localization / max(localization, 1e-30)
        return 1.0

    def typical_share(self, sampler: SGLD) -> float:
        """eps a_max / 4 of a resolved sampler at typical draws, at its largest gain; below 1 if averaged."""
        return float(sampler.lr) * sampler.gain * self.stiffest(float(sampler.localization)) / 4.0

    def stability_share(self, sampler: SGLD) -> float:
        """The same at the steepest draw of a thousand."""
        return float(sampler.lr) * sampler.gain * self.steepest(float(sampler.localization)) / 4.0

    def discretisation(self, sampler: SGLD) -> float:
        """eps a_max / 4 of a resolved sampler; with a preconditioner, at its largest gain: an upper bound.

        Its square for averaged noise, whose error is of second order (and zero in a quadratic).
        """
        first_order = self.typical_share(sampler)
        return first_order**2 if sampler.averaged else first_order

    def noise_ratio(self, sampler: SGLD) -> float:
        """eps n_beta^2 f lambda_max / 4, likewise; with a control variate, of what it leaves."""
        controlled = sampler.control_variate is True
        return float(sampler.lr) * sampler.gain * self.noise_per_lr(controlled, float(sampler.localization))

    def foreseen_bias(self, sampler: SGLD) -> float | None:
        """Relative excess of the variance of the stiffest and noisiest mode; None where noise was not measured."""
        if not self.knows_noise(sampler.control_variate is True):
            return None
        share = self.typical_share(sampler)
        if share >= 1.0:
            return math.inf
        noise, strength = self.noise_ratio(sampler), sampler.correction if self.batch_factor > 0 else 0.0
        return foreseen_bias(share, noise, averaged=sampler.averaged, alpha=strength)

    def knows_noise(self, controlled: bool) -> bool:
        """Whether it has been measured: what a control variate leaves of it only away from w*."""
        return not controlled or self.control_variance is not None or self.batch_factor == 0.0

    def noise_per_lr(self, controlled: bool, localization: float) -> float:
        """n_beta^2 f lambda_max / 4. What a control variate leaves goes as the spread around w*, 1 / localization."""
        variance = self._left(localization) if controlled else self.loudest(localization)
        return self.n_beta**2 * self.batch_factor * variance / 4.0

    def informed(
        self, curvature: Tensor, variance: Tensor, glances: Tensor, *, localization: float, controlled: bool
    ) -> Pilot:
        """With what a run's chains measured at their draws. Each last draw counts alike, a trial's too.

        Args:
            curvature, variance: [C], NaN where it was not measured; the variance is that of the gradients, with a
                control variate (`controlled`) of what it leaves of them.
            glances: [C, T], NaN likewise: how much the curvature varies over draws.
        """
        times = int(torch.isfinite(curvature).sum())
        if times == 0:
            return self
        left = None if self.control_variance is None else self._left(localization)
        loud = None if self.drawn_variance is None else self.loudest(localization)
        left, loud = (_mean(left, 1, variance), loud) if controlled else (left, _mean(loud, 1, variance))
        typical = _mean(self.typical(localization), self.drawn_times, curvature) or 0.0
        before = self.steepest_curvature(localization) / max(self.typical(localization), 1e-30)
        return dataclasses.replace(
            self,
            drawn_curvature=typical,
            drawn_steepest=max(steepness(glances), before if self.drawn_times else 1.0) * typical,
            drawn_localization=localization,
            drawn_times=self.drawn_times + times,
            drawn_variance=loud,
            control_variance=left,
            control_localization=None if left is None else localization,
        )

    def describe(self, num_train: int) -> str:
        """What was measured, in a line."""
        there = "" if self.drawn_curvature is None else f" at w* and {self.drawn_curvature:.3g} at a draw"
        return (
            f"curvature up to {self.curvature:.3g}{there}, gradient variance {self.gradient_variance:.3g} "
            f"({self.num_samples} of {num_train} training samples)"
        )

    def foresee(self, sampler: SGLD, num_train: int) -> str:
        """The biases to be expected of a resolved sampler, in a line."""
        bias = f"discretisation {self.discretisation(sampler):.1%}"
        if sampler.averaged:
            bias = f"step at {self.typical_share(sampler):.0%} of the stability limit"
        batch = minibatch_of(sampler.batch_size, num_train)
        noise = f"{self.noise_ratio(sampler):.2g}" if self.knows_noise(sampler.control_variate is True) else "unknown"
        return f"{bias}, gradient-noise ratio {noise} (minibatch {batch})"

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def batch_factor(num_train: int, batch: int) -> float:
    """f: the variance of the mean of a minibatch, drawn without replacement, over that of one sample."""
    return (num_train - batch) / (batch * (num_train - 1)) if num_train > 1 else 0.0


def default_n_beta(num_train: int) -> float:
    """n / ln n, n the number of training samples, or unmasked tokens (Watanabe's inverse temperature 1 / ln n)."""
    return num_train / math.log(max(num_train, 3))


def run_pilot(task: Task, train: Samples, sampler: SGLD, effort: Effort | None = None, *, seed: int) -> Pilot:
    """Measure the largest curvature and the largest gradient variance, on as many training samples as are paid for."""
    n = len(train)
    asked = (effort or Effort(automatic=chooses(sampler))).at_w_star(n)
    return Pilot(
        curvature=largest_curvature(task, train, seed=seed, **asked),
        gradient_variance=gradient_variance(task, train, seed=seed, **asked),
        n_beta=sampler.n_beta if sampler.n_beta is not None else default_n_beta(task.loss.num_terms(n)),
        batch_factor=batch_factor(n, minibatch_of(sampler.batch_size, n)),
        num_samples=min(2 * asked["most"] if asked["held_out"] else asked["most"], n),
    )


def _mean(known: float | None, times: int, measured: Tensor) -> float | None:
    """Of what was known from so many draws and what was measured at others, where it is not NaN."""
    found = measured[torch.isfinite(measured)].tolist()
    if known is not None:
        found += [known] * times
    return sum(found) / len(found) if found else None
