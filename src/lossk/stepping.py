"""What the chains that step by minibatch gradients share: their settings as numbers, and a gradient that is watched."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from lossk.chain import Chain, Surroundings
from lossk.correction import Correction
from lossk.curvature import Sample, control_variance, gradient_variance, largest_curvature
from lossk.force import MinibatchForce
from lossk.settings import SteppingSettings


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
        self.force = MinibatchForce(around, sampler.batch_size, chain, control_variate=control_variate)
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
        return excess

    def judge(self) -> tuple[float, float]:
        chains, samples = self.around.judging
        if self.chain >= chains:
            return math.nan, math.nan
        sample: Sample = {"most": samples, "which": 1 + self.chain, "held_out": True}
        noise = gradient_variance if self.force.control is None else control_variance

        def measured(what: Callable[..., float]) -> float:
            try:
                return what(self.task, self.around.train, seed=self.around.seed, **sample)
            except (ValueError, torch.OutOfMemoryError):  # not finite, or no room for it: stays unknown
                return math.nan

        with self.around.timings.measure("curvature"):
            return measured(largest_curvature), measured(noise) if self.force.draws_minibatches else math.nan


def explosion_limit(anchor_loss: float, num_weights: int, n_beta: float) -> float:
    """The minibatch loss above which a chain counts as exploded, in nats.

    A local posterior raises the mean loss by at most about P / (2 n_beta) (every direction regular); a hundred times
    that, and a hundred times the loss itself plus one, is beyond any chain that still samples it.
    """
    return 100.0 * (1.0 + abs(anchor_loss) + num_weights / (2.0 * n_beta))
