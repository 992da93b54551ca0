"""Stochastic gradient Langevin dynamics around the trained weights.

    w <- w - (lr/2) [ n_beta grad L_B(w) + localization (w - w*) ] + sqrt(lr) xi,   xi ~ N(0, I)

whose stationary law is, up to discretisation and minibatch noise,

    p(w) ~ exp( -n_beta L_n(w) - localization/2 |w - w*|^2 )

(Welling and Teh 2011; the localised form of Lau et al., arXiv 2308.12108; devinterp's convention of the step size).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lossk.data import Samples
from lossk.errors import DivergedError
from lossk.minibatches import Minibatches
from lossk.ops.sgld_step import sgld_step
from lossk.settings import check_choice, check_integer, check_number, check_patterns
from lossk.task import Task
from lossk.timings import Timings

PRECONDITIONERS = (None, "rmsprop", "rmsprop-frozen")
ALPHA, STABILITY = 0.99, 0.1  # of the RMSprop preconditioner


@dataclass(frozen=True, kw_only=True)
class SGLD:
    """Sampler settings; "auto" values are chosen by a pilot before sampling, printed, and saved with the result.

    Args:
        lr: step size epsilon, or "auto".
        n_beta: n times the inverse temperature; None is n / ln n with n the number of *training* samples.
        localization: gamma, the strength of the pull towards w*, or "auto".
        batch_size: minibatch size; None or at least n is the full gradient.
        num_burnin_steps: steps before the first draw's own steps, per chain, or "auto".
        num_steps_bw_draws: steps from one draw to the next, or "auto".
        preconditioner: None; "rmsprop" (alpha 0.99, stability 0.1, no bias correction; devinterp's convention), whose
            stationary law is not known in closed form, because it leaves out the correction term for a preconditioner
            that moves with the weights (Li et al. 2016, eq. 7); or "rmsprop-frozen", the same until the end of burn-in
            and constant from then on, so that the law is p(w) up to discretisation and minibatch noise.
        params: shell-style patterns of the parameter names to sample; None is every parameter that requires grad.

    Raises:
        ValueError, TypeError: naming the argument, the rule and the value.
    """

    lr: float | Literal["auto"] = "auto"
    n_beta: float | None = None
    localization: float | Literal["auto"] = "auto"
    batch_size: int | None = 256
    num_burnin_steps: int | Literal["auto"] = "auto"
    num_steps_bw_draws: int | Literal["auto"] = "auto"
    preconditioner: Literal["rmsprop", "rmsprop-frozen"] | None = None
    params: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.lr != "auto":
            check_number("lr", self.lr, "a number or 'auto'", above=0.0)
        if self.localization != "auto":
            check_number("localization", self.localization, "a number or 'auto'", least=0.0)
        if self.n_beta is not None:
            check_number("n_beta", self.n_beta, "a number or None", above=0.0)
        if self.batch_size is not None:
            check_integer("batch_size", self.batch_size, 1)
        if self.num_burnin_steps != "auto":
            check_integer("num_burnin_steps", self.num_burnin_steps, 0)
        if self.num_steps_bw_draws != "auto":
            check_integer("num_steps_bw_draws", self.num_steps_bw_draws, 1)
        check_choice("preconditioner", self.preconditioner, PRECONDITIONERS)
        object.__setattr__(self, "params", check_patterns(self.params))

    @property
    def gain(self) -> float:
        """The largest factor by which the preconditioner can multiply a step: 1 / stability, or 1 without one."""
        return 1.0 if self.preconditioner is None else 1.0 / STABILITY

    @property
    def resolved(self) -> bool:
        """Whether every setting is a number."""
        automatic = (self.lr, self.localization, self.num_burnin_steps, self.num_steps_bw_draws)
        return "auto" not in automatic and self.n_beta is not None

    def steps(self, num_draws: int) -> int:
        """Steps of one chain of `num_draws` draws, once resolved."""
        return int(self.num_burnin_steps) + num_draws * int(self.num_steps_bw_draws)

    def to_dict(self) -> dict[str, Any]:
        """A plain, JSON-ready form; `SGLD(**d)` gives it back."""
        plain = dataclasses.asdict(self)
        plain["params"] = None if self.params is None else list(self.params)
        return plain


@dataclass
class ChainState:
    """Where a chain stands: enough, with its seed, to go on bitwise."""

    chain: int
    step: int  # SGLD steps taken, burn-in included
    draw: int  # draws given
    weights: Tensor  # [P] float32
    square_avg: Tensor | None  # [P] float32, RMSprop's running mean square gradient


@dataclass(frozen=True)
class Draw:
    """One draw of a chain; the weights themselves are in `task.flat`."""

    chain: int
    draw: int
    excess_loss: float  # mean over the steps since the last draw of L_B(w) - L_B(w*), nats


class Chain:
    """One SGLD chain from w*. `run` yields after every step; at a draw the draw's weights are in place."""

    def __init__(
        self,
        task: Task,
        train: Samples,
        anchor_losses: Tensor,
        sampler: SGLD,
        *,
        chain: int,
        seed: int,
        backend: str,
        timings: Timings,
    ) -> None:
        assert sampler.resolved
        self.task, self.train, self.sampler = task, train, sampler
        self.anchor_losses = anchor_losses  # [n] float64, losses at w*: their minibatch mean is a control variate
        self.chain, self.seed, self.backend, self.timings = chain, seed, backend, timings
        self.minibatches = Minibatches(len(train), sampler.batch_size, seed=seed, chain=chain)
        self.step, self.draw = 0, 0
        self.square_avg: Tensor | None = None
        self.limit = explosion_limit(float(anchor_losses.mean()), task.num_weights, float(sampler.n_beta or 1))

    def state(self) -> ChainState:
        square_avg = None if self.square_avg is None else self.square_avg.clone()
        return ChainState(self.chain, self.step, self.draw, self.task.flat.clone(), square_avg)

    def run(self, num_draws: int, start: ChainState | None = None) -> Iterator[Draw | None]:
        """From w* (or from after `start`) to draw number `num_draws`: a Draw at each draw, None at other steps."""
        self.task.reset()
        if self.sampler.preconditioner is not None:
            self.square_avg = torch.zeros_like(self.task.flat)
        if start is not None:
            self.step, self.draw = start.step, start.draw
            self.task.flat.copy_(start.weights)
            if start.square_avg is not None:
                self.square_avg = start.square_avg.clone()
        while self.step < int(self.sampler.num_burnin_steps):
            self.advance()
            yield None
        steps = int(self.sampler.num_steps_bw_draws)
        while self.draw < num_draws:
            excess = 0.0
            for _ in range(steps - 1):
                excess += self.advance()
                yield None
            excess += self.advance()
            self.draw += 1
            yield Draw(self.chain, self.draw - 1, excess / steps)

    @property
    def _frozen(self) -> bool:
        return self.sampler.preconditioner == "rmsprop-frozen" and self.step >= int(self.sampler.num_burnin_steps)

    def advance(self) -> float:
        """One SGLD step; returns L_B(w) - L_B(w*) at the weights before it."""
        with self.timings.measure("gradient"):
            index = self.minibatches[self.step]
            loss = self.task.gradient(self.train, index)
        if not (math.isfinite(loss) and loss < self.limit):
            raise self.diverged(f"minibatch loss {loss:.4g} (limit {self.limit:.4g})")
        with self.timings.measure("step"):
            sgld_step(
                self.task.flat,
                self.task.grad,
                self.task.anchor,
                lr=float(self.sampler.lr),
                n_beta=float(self.sampler.n_beta or 0),
                localization=float(self.sampler.localization),
                seed=self.seed,
                chain=self.chain,
                step=self.step,
                backend=self.backend,
                square_avg=self.square_avg,
                alpha=ALPHA,
                stability=STABILITY,
                update_square_avg=not self._frozen,
            )
        self.step += 1
        return loss - float(self.anchor_losses[index].mean())

    def diverged(self, what: str) -> DivergedError:
        """The error for a loss that left the neighbourhood of w*."""
        lr = float(self.sampler.lr)
        return DivergedError(
            f"chain {self.chain} diverged at step {self.step}: {what}, "
            f"mean loss at the trained weights {float(self.anchor_losses.mean()):.4g}; "
            f"try lr={lr / 8:.2g} instead of {lr:.2g}, or a larger localization than {self.sampler.localization:.3g}"
        )


def explosion_limit(anchor_loss: float, num_weights: int, n_beta: float) -> float:
    """The minibatch loss above which a chain counts as exploded, in nats.

    A local posterior raises the mean loss by at most about P / (2 n_beta) (every direction regular); a hundred times
    that, and a hundred times the loss itself plus one, is beyond any chain that still samples it.
    """
    return 100.0 * (1.0 + abs(anchor_loss) + num_weights / (2.0 * n_beta))
