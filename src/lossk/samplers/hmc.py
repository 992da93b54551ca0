"""Hamiltonian Monte Carlo with the full gradient and a Metropolis test: the exact law, and the slow reference.

    p ~ N(0, I);  num_leapfrog_steps times  p <- p - (h/2) grad U,  w <- w + h p,  p <- p - (h/2) grad U
    keep the end with probability min(1, exp(H before - H after)),  H = U(w) + |p|^2 / 2

(R. M. Neal, "MCMC using Hamiltonian dynamics", 2011). One leapfrog step is MALA with lr = h^2 (Roberts and Tweedie
1996). The stationary law is p(w) ~ exp(-n_beta L_n(w) - localization/2 |w - w*|^2) without discretisation or minibatch
bias, up to the rounding of energies (`lossk.samplers.metropolis`). A step costs num_leapfrog_steps passes over all
training data and its acceptance falls with the number of weights: for small models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from lossk.checks import check_choice, check_integer, check_number
from lossk.errors import DivergedError
from lossk.ops.philox import normals, uint32_stream
from lossk.samplers.chain import Chain, Surroundings
from lossk.samplers.metropolis import Energy, kinetic, probability
from lossk.settings import METRICS, MOST_STEPS, SamplerSettings, check_n_beta, put

STREAM = 4  # of the Philox counter: the uniform numbers of the tests


@dataclass(frozen=True, kw_only=True)
class HMC(SamplerSettings):
    """Sampler settings. Aim at an acceptance (`kernel.diagnostics.acceptance`) of 0.6 to 0.9.

    Args:
        step_size: h of a leapfrog step, greater than 0.
        localization: gamma, the strength of the pull towards w*, at least 0.
        metric: None, or "fisher", as for SGLD.
        num_leapfrog_steps: of each trajectory; 1 is MALA.
        n_beta: n times the inverse temperature; None is n / ln n with n the number of *training* samples.
        num_burnin_steps: trajectories before the first draw's own, per chain.
        num_steps_bw_draws: trajectories from one draw to the next.
        params: shell-style patterns of the parameter names to sample; None is every parameter that requires grad.

    Raises:
        ValueError, TypeError: naming the argument, the rule and the value.
    """

    step_size: float
    localization: float
    metric: Literal["fisher"] | None = None
    num_leapfrog_steps: int = 10
    n_beta: float | None = None
    num_burnin_steps: int = 0
    num_steps_bw_draws: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        put(
            self,
            step_size=check_number("step_size", self.step_size, above=0.0),
            localization=check_number("localization", self.localization, least=0.0),
            metric=check_choice("metric", self.metric, METRICS),
            num_leapfrog_steps=check_integer("num_leapfrog_steps", self.num_leapfrog_steps, 1, ceiling=MOST_STEPS),
            n_beta=check_n_beta(self.n_beta),
            num_burnin_steps=check_integer("num_burnin_steps", self.num_burnin_steps, 0, ceiling=MOST_STEPS),
            num_steps_bw_draws=check_integer("num_steps_bw_draws", self.num_steps_bw_draws, 1, ceiling=MOST_STEPS),
        )

    def steps(self, num_draws: int) -> int:
        """Trajectories of one chain of `num_draws` draws."""
        num_draws = check_integer("num_draws", num_draws, 1)
        return self.num_burnin_steps + num_draws * self.num_steps_bw_draws


class HMCChain(Chain):
    """One chain from w*. `carried` holds grad U at the weights, `force` [P], and L_n there, `loss` [] float64."""

    def __init__(self, around: Surroundings, sampler: HMC, chain: int) -> None:
        assert sampler.n_beta is not None
        super().__init__(
            around,
            chain,
            num_burnin_steps=sampler.num_burnin_steps,
            num_steps_bw_draws=sampler.num_steps_bw_draws,
        )
        self.sampler = sampler
        self.energy = Energy(self.task, around.train, n_beta=sampler.n_beta, localization=sampler.localization)
        self.anchor_loss = float(around.anchor_losses.mean())
        self._tests = self._passed = 0  # since the last draw

    def begin(self) -> None:
        force = torch.empty_like(self.task.flat)
        with self.around.timings.measure("gradient"):
            loss = self.energy.gradient(force)
        self.carried = {"force": force, "loss": torch.tensor(loss, dtype=torch.float64, device="cpu")}

    def advance(self) -> float:
        """One trajectory and its test; returns L_n(w) - L_n(w*) at the weights after it."""
        weights, loss = self.task.flat.clone(), float(self.carried["loss"])
        force = self.carried["force"].clone()
        momentum = normals(self.around.seed, self.chain, self.step, self.task.num_weights).to(self.task.device)
        before = self.energy.value(loss) + kinetic(momentum)
        with self.around.timings.measure("gradient"):
            proposed = self.energy.leapfrog(
                momentum, force, step_size=self.sampler.step_size, num_steps=self.sampler.num_leapfrog_steps
            )
        rise = self.energy.value(proposed) + kinetic(momentum) - before
        word = int(uint32_stream(self.around.seed, self.chain, self.step, STREAM, 1)[0])
        passed = (word + 0.5) / 2**32 < probability(rise)
        if passed:
            loss, self.carried["force"] = proposed, force
            self.carried["loss"] = torch.tensor(loss, dtype=torch.float64, device="cpu")
        else:
            self.task.flat.copy_(weights)
        self._tests, self._passed = self._tests + 1, self._passed + passed
        self.step += 1
        return loss - self.anchor_loss

    def acceptance(self) -> float:
        """The share of tests passed since the last draw (burn-in counts towards the first)."""
        share = self._passed / self._tests if self._tests else math.nan
        self._tests = self._passed = 0
        return share

    def diverged(self, what: str) -> DivergedError:
        h = self.sampler.step_size
        return DivergedError(
            f"chain {self.chain} diverged at step {self.step}: {what}, mean loss at the trained weights "
            f"{self.anchor_loss:.4g}; try step_size={h / 3:.2g} instead of {h:.2g}, or a larger localization than "
            f"{self.sampler.localization:.3g}"
        )
