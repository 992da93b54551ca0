"""An isotropic Gaussian around the trained weights: independent draws w = w* + sigma xi, no gradients.

The control that shows what the low-loss constraint of SGLD adds. For small sigma the kernel tends to gradient
similarity, K_ij / sigma^2 -> g_i'g_j: the gradient at w* is all that a small isotropic cloud can feel.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lossk.errors import DivergedError
from lossk.ops.philox import normals
from lossk.settings import check_number, check_patterns
from lossk.sgld import ChainState, Draw
from lossk.task import Task


@dataclass(frozen=True, kw_only=True)
class Gaussian:
    """Draws w* + sigma xi, xi ~ N(0, I).

    Args:
        sigma: standard deviation of each weight's displacement, greater than 0.
        params: shell-style patterns of the parameter names to move; None is every parameter that requires grad.

    Raises:
        ValueError, TypeError: naming the argument, the rule and the value.
    """

    sigma: float
    params: Sequence[str] | None = None

    def __post_init__(self) -> None:
        check_number("sigma", self.sigma, "a number", above=0.0)
        object.__setattr__(self, "params", check_patterns(self.params))

    def steps(self, num_draws: int) -> int:
        """Moves of one chain of `num_draws` draws."""
        return num_draws

    def to_dict(self) -> dict[str, Any]:
        """A plain, JSON-ready form; `Gaussian(**d)` gives it back."""
        plain = dataclasses.asdict(self)
        plain["params"] = None if self.params is None else list(self.params)
        return plain


class GaussianChain:
    """One run of independent draws; the draw's number is the step of its counter-based noise."""

    def __init__(self, task: Task, sampler: Gaussian, *, chain: int, seed: int) -> None:
        self.task, self.sampler, self.chain, self.seed = task, sampler, chain, seed
        self.step = 0

    def state(self) -> ChainState:
        return ChainState(self.chain, self.step, self.step, self.task.flat.clone(), None)

    def run(self, num_draws: int, start: ChainState | None = None) -> Iterator[Draw]:
        """From the first draw (or from after `start`) to draw number `num_draws`."""
        self.step = 0 if start is None else start.step
        while self.step < num_draws:
            self.advance()
            yield Draw(self.chain, self.step - 1, math.nan)

    def advance(self) -> None:
        """One draw."""
        noise = normals(self.seed, self.chain, self.step, self.task.num_weights).to(self.task.device)
        self.task.flat.copy_(self.task.anchor).add_(noise, alpha=self.sampler.sigma)
        self.step += 1

    def diverged(self, what: str) -> DivergedError:
        """The error for a non-finite loss."""
        sigma = self.sampler.sigma
        return DivergedError(
            f"chain {self.chain}, draw {self.step - 1}: {what}; try sigma={sigma / 4:.2g} instead of {sigma:.2g}"
        )
