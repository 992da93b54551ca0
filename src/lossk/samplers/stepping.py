"""What the chains that step by minibatch gradients share: their settings as numbers, and a gradient that is watched."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Unpack

import torch

from lossk.curvature.curvature import GLANCE, Sample, control_variance, gradient_variance, largest_curvature
from lossk.samplers.chain import Chain, Surroundings
from lossk.samplers.correction import Correction
from lossk.samplers.force import MinibatchForce
from lossk.settings import SteppingSettings, minibatch_of

ROUNDING = 1e-4  # of a training loss in float32, relative


class SteppingChain(Chain):
    """A chain of resolved settings, whose every gradient is that of a minibatch.

    Args:
        control_variate: of the minibatch gradient.
    """

    def __init__(self, around: Surroundings, sampler: SteppingSettings, chain: int, *, control_variate: bool) -> None:
        assert sampler.resolved
        super().__init__(
            around,
            chain,
            num_burnin_steps=int(sampler.num_burnin_steps),
            num_steps_bw_draws=int(sampler.num_steps_bw_draws),
        )
        assert sampler.n_beta is not None
        self.n_beta, self.localization = float(sampler.n_beta), float(sampler.localization)
        self.force = MinibatchForce(
            around, minibatch_of(sampler.batch_size, len(around.train)), chain, control_variate=control_variate
        )
        self.highest = highest_rise(self.task.num_weights, self.n_beta)
        self.limit = explosion_limit(float(around.anchor_losses.mean()), self.task.num_weights, self.n_beta)

    def gradient(self, minibatch: int, correction: Correction | None = None) -> float:
        """Leave the minibatch's gradient in `task.grad`; returns L_B(w) - L_B(w*).

        Args:
            correction: of the step's noise, to be made by the gradient.

        Raises:
            DivergedError: its loss is beyond any chain that still samples around w*.
        """
        with self.around.timings.measure("gradient"):
            loss, excess = self.force.gradient(minibatch, correction)
        if not (math.isfinite(loss) and loss < self.limit):
            raise self.diverged(f"minibatch loss {loss:.4g} (limit {self.limit:.4g})")
        if not self.force.draws_minibatches and excess > self.highest + ROUNDING * (1 + abs(loss)):
            raise self.diverged(f"the training loss has risen by {excess:.4g} (limit {self.highest:.4g})")
        return excess

    @property
    @abstractmethod
    def reach(self) -> float:
        """How far the noise of one step moves the weights along any one direction."""

    def judge(self) -> tuple[float, float]:
        if self.chain >= self.around.judging.chains:
            return math.nan, math.nan
        sample: Sample = {"most": self.around.judging.samples, "which": 1 + self.chain, "held_out": True}
        noise = gradient_variance if self.force.control is None else control_variance
        variance = self._measured(noise, **sample) if self.force.draws_minibatches else math.nan
        return self._measured(largest_curvature, **sample), variance

    def glance(self) -> float:
        sample: Sample = {**GLANCE, "across": self.reach / 2}
        return self._measured(largest_curvature, **sample)

    def _measured(self, what: Callable[..., float], **sample: Unpack[Sample]) -> float:
        with self.around.timings.measure("curvature"):
            try:
                return what(self.task, self.around.train, seed=self.around.seed, **sample)
            except (ValueError, torch.OutOfMemoryError):  # not finite, or no room for it: stays unknown
                return math.nan


def highest_rise(num_weights: int, n_beta: float) -> float:
    """The rise of the training loss beyond which no draw of p(w) lies, in nats: only a step too long leads there.

    n_beta times the rise is Gamma(P / 2) where every direction is regular, and less elsewhere: above 5 P / 2 + 50 with
    a probability below e^-50.
    """
    return (2.5 * num_weights + 50.0) / n_beta


def explosion_limit(anchor_loss: float, num_weights: int, n_beta: float) -> float:
    """The minibatch loss above which a chain counts as exploded, in nats.

    A local posterior raises the mean loss by at most about P / (2 n_beta) (every direction regular); a hundred times
    that, and a hundred times the loss itself plus one, is beyond any chain that still samples it.
    """
    return 100.0 * (1.0 + abs(anchor_loss) + num_weights / (2.0 * n_beta))
