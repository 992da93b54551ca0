"""An isotropic Gaussian around the trained weights: independent draws w = w* + sigma xi, no gradients.

The control that shows what the low-loss constraint of SGLD adds. For small sigma the kernel tends to gradient
similarity, K_ij / sigma^2 -> g_i'g_j: the gradient at w* is all that a small isotropic cloud can feel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lossk.checks import check_integer, check_number
from lossk.errors import DivergedError
from lossk.ops.philox import normals
from lossk.samplers.chain import Chain, Surroundings
from lossk.settings import SamplerSettings, put


@dataclass(frozen=True, kw_only=True)
class Gaussian(SamplerSettings):
    """Draws w* + sigma xi, xi ~ N(0, I).

    Args:
        sigma: standard deviation of each weight's displacement, greater than 0.
        params: shell-style patterns of the parameter names to move; None is every parameter that requires grad.

    Raises:
        ValueError, TypeError: naming the argument, the rule and the value.
    """

    sigma: float

    def __post_init__(self) -> None:
        super().__post_init__()
        put(self, sigma=check_number("sigma", self.sigma, above=0.0))

    def steps(self, num_draws: int) -> int:
        """Moves of one chain of `num_draws` draws."""
        return check_integer("num_draws", num_draws, 1)


class GaussianChain(Chain):
    """One run of independent draws; the draw's number is the step of its counter-based noise."""

    def __init__(self, around: Surroundings, sampler: Gaussian, chain: int) -> None:
        super().__init__(around, chain)
        self.sampler = sampler

    def advance(self) -> float:
        """One draw; no loss is evaluated."""
        noise = normals(self.around.seed, self.chain, self.step, self.task.num_weights).to(self.task.device)
        self.task.flat.copy_(self.task.anchor).add_(noise, alpha=self.sampler.sigma)
        self.step += 1
        return math.nan

    def diverged(self, what: str) -> DivergedError:
        sigma = self.sampler.sigma
        return DivergedError(
            f"chain {self.chain}, draw {self.step - 1}: {what}; try sigma={sigma / 4:.2g} instead of {sigma:.2g}"
        )
