"""A chain: what every sampler's chain has in common. It yields after each step; its caller consumes.

A sampler is one file with a settings class and three functions: `fit` (what all its chains share, worked out once),
and, of its chain, `begin` (the state at w*) and `advance` (one step).
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from torch import Tensor

from lossk.data.data import Samples
from lossk.device import settle
from lossk.errors import DivergedError
from lossk.task.task import Task
from lossk.timings import Timings


@dataclass
class ChainState:
    """Where a chain stands: enough, with its seed, to go on bitwise."""

    chain: int
    step: int  # steps taken, burn-in included
    draw: int  # draws given
    weights: Tensor  # [P] float32
    carried: dict[str, Tensor] = field(default_factory=dict)  # what the sampler remembers besides: momenta, say


@dataclass(frozen=True)
class Draw:
    """One draw of a chain; the weights themselves are in `task.flat`."""

    chain: int
    draw: int
    excess_loss: float  # mean over the steps since the last draw of L_B(w) - L_B(w*), nats; NaN where unknown
    distance: float  # |w - w*|
    acceptance: float = math.nan  # that a Metropolis test of a step from here would have, where it was asked for
    curvature: float = math.nan  # h_max of the training loss here, at the last draw of a chain that measures it
    variance: float = math.nan  # lambda_max(Cov g) there; with a control variate, of what it leaves
    glance: float = math.nan  # h_max over few samples, the same at all draws: how it varies, not how large it is


def numbers_of(draw: Draw) -> tuple[float, ...]:
    """What a draw says beside its chain and number: with these it is made again."""
    return draw.excess_loss, draw.distance, draw.acceptance, draw.curvature, draw.variance, draw.glance


@dataclass(frozen=True)
class Judging:
    """What chains measure of the loss at their draws."""

    chains: int = 0  # so many measure it at their last draw
    samples: int = 0  # on so many samples, and as many held out
    glances: int = 0  # draws of each chain, evenly spaced, at which its curvature is glanced at


@dataclass(frozen=True)
class Surroundings:
    """What the chains of one run share."""

    task: Task
    train: Samples
    anchor_losses: Tensor  # [n] float64, losses of `train` at w*
    seed: int
    backend: str
    timings: Timings
    fitted: dict[str, Tensor]  # what the sampler's `fit` returned
    judging: Judging = Judging()


class Chain(ABC):
    """One chain from w*. `run` yields after every step; at a draw the draw's weights are in place.

    Args:
        num_burnin_steps: steps before the first draw's own steps.
        num_steps_bw_draws: steps of each draw.
    """

    def __init__(
        self, around: Surroundings, chain: int, *, num_burnin_steps: int = 0, num_steps_bw_draws: int = 1
    ) -> None:
        self.around, self.task, self.chain = around, around.task, chain
        self.num_burnin_steps, self.num_steps_bw_draws = num_burnin_steps, num_steps_bw_draws
        self.step, self.draw = 0, 0
        self.carried: dict[str, Tensor] = {}

    def begin(self) -> None:  # noqa: B027 - most samplers remember nothing but the weights
        """Fill `carried` as it is at w*, step 0."""

    @abstractmethod
    def advance(self) -> float:
        """One step; returns L_B(w) - L_B(w*) where its gradient is taken (NaN where no loss is evaluated)."""

    @abstractmethod
    def diverged(self, what: str) -> DivergedError:
        """The error for a loss that left the neighborhood of w*, with one change to make."""

    def acceptance(self) -> float:
        """Of a Metropolis test of a step from the present weights; NaN unless the sampler was asked for it."""
        return math.nan

    def judge(self) -> tuple[float, float]:
        """(h_max of the training loss, lambda_max of the gradients' covariance) here; NaN where not to be measured."""
        return math.nan, math.nan

    def glance(self) -> float:
        """h_max of the training loss over a few samples; NaN where it is not to be measured."""
        return math.nan

    def _to_glance(self, num_draws: int) -> bool:
        """Whether this draw is one of those that are glanced at."""
        glances = min(self.around.judging.glances, num_draws)
        return (self.draw * glances) // num_draws > ((self.draw - 1) * glances) // num_draws

    def state(self) -> ChainState:
        carried = {name: tensor.clone() for name, tensor in self.carried.items()}
        return ChainState(self.chain, self.step, self.draw, self.task.flat.clone(), carried)

    def run(self, num_draws: int, start: ChainState | None = None) -> Iterator[Draw | None]:
        """From w* (or from after `start`) to draw number `num_draws`: a Draw at each draw, None at other steps."""
        self.task.reset()
        if start is None:
            self.begin()
        else:
            self.step, self.draw = start.step, start.draw
            self.task.flat.copy_(start.weights)
            self.carried = {name: tensor.to(self.task.device).clone() for name, tensor in start.carried.items()}
        while self.step < self.num_burnin_steps:
            self.advance()
            yield None
        steps = self.num_steps_bw_draws
        while self.draw < num_draws:
            excess = 0.0
            for _ in range(steps - 1):
                excess += self.advance()
                yield None
            excess += self.advance()
            self.draw += 1
            found = self.judge() if self.draw == num_draws else (math.nan, math.nan)
            glance = self.glance() if self._to_glance(num_draws) else math.nan
            distance = self.task.distance()
            yield Draw(self.chain, self.draw - 1, excess / steps, distance, self.acceptance(), *found, glance)


def time_a_step(chain: Chain) -> float:
    """Seconds per step: the quickest of three, from w* and back; one that explodes takes as long."""
    best = math.inf
    chain.begin()
    for _ in range(3):
        start = time.perf_counter()
        with suppress(DivergedError):
            chain.advance()
        settle(chain.task.device)
        best = min(best, time.perf_counter() - start)
    chain.task.reset()
    return best
