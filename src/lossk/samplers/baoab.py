"""Kinetic Langevin dynamics around the trained weights, by the BAOAB splitting: unit mass, one gradient a step.

With U(w) = n_beta L_n(w) + localization/2 |w - w*|^2, F = grad U, step size h and c = exp(-friction h):

    v <- v - (h/2) F                      B
    w <- w + (h/2) v                      A
    v <- c v + sqrt(1 - c^2) xi           O,  xi ~ N(0, I)
    w <- w + (h/2) v                      A
    v <- v - (h/2) F of a new minibatch   B

(B. Leimkuhler and C. Matthews, "Rational construction of stochastic numerical methods for molecular sampling", Applied
Mathematics Research eXpress 2013). The stationary law of w is p(w) ~ exp(-U(w)) up to minibatch noise and a
discretisation error of order h^2, which for a quadratic U is zero at every h with h^2 a_max < 4. The closing kick of a
step and the opening one of the next use the same force.

Low friction is what makes flat modes quick, and what makes minibatch noise count: in its worst direction it adds
h^2 n_beta^2 Var(g) / (1 - c^2) to the thermostat's noise. The control variate leaves only the noise of the samples' own
curvatures, which no setting here bounds: with a localization far below the stiffest curvature and few samples in a
minibatch it can still widen stiff modes several times. Compare with batch_size=None where that is affordable.

Momentum carries flat directions along: they forget in about 2 / (h sqrt(localization)) steps, where SGLD takes
2 / (lr localization): the square root of the condition number instead of the condition number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from lossk.checks import check_automatic, check_flag
from lossk.errors import DivergedError
from lossk.ops.philox import normals
from lossk.ops.sgld_step import sgld_step
from lossk.samplers.chain import Surroundings
from lossk.samplers.stepping import SteppingChain
from lossk.settings import FEWEST_BATCH, SteppingSettings, put

STREAM = 3  # of the Philox counter: the first velocities


@dataclass(frozen=True, kw_only=True)
class BAOAB(SteppingSettings):
    """Sampler settings; "auto" values are chosen before sampling, printed, and saved with the result.

    Args:
        step_size: h, in units of 1 / sqrt(curvature of U), or "auto": h^2 (n_beta h_max + localization) = 1,
            with h_max the largest curvature at w* and at typical draws of a trial chain.
        friction: rate at which velocities forget, in the inverse unit of h, greater than 0, or "auto": the value at
            which the slowest mode of a quadratic U forgets soonest, 1.4 to 2 times sqrt(localization)
            (`lossk.pilot.modes`).
        n_beta: n times the inverse temperature; None is n / ln n with n the number of *training* samples.
        localization: gamma, the strength of the pull towards w*, or "auto": the value SGLD(localization="auto") takes.
        metric: None or "fisher", as for SGLD; localization="fisher" is short for "auto" with it.
        batch_size: minibatch size; None or at least n is the full gradient. "auto" takes 256, 512, ... or all samples,
            whichever costs least at a foreseen bias within 5 %; 256 where step_size is a number.
        num_burnin_steps: steps before the first draw's own steps, per chain, or "auto": every mode has 99 % of its
            stationary variance.
        num_steps_bw_draws: steps from one draw to the next, or "auto": every mode's autocorrelation is at most 1/e.
        control_variate: take g_B(w) - g_B(w*) + g_n(w*) for the minibatch gradient (Baker et al. 2019, arXiv
            1706.05439): the same mean, little noise near w*, twice the cost of a step. Without it "auto" shortens h.
        params: shell-style patterns of the parameter names to sample; None is every parameter that requires grad.

    Raises:
        ValueError, TypeError: naming the argument, the rule and the value.
    """

    step_size: float | Literal["auto"] = "auto"
    friction: float | Literal["auto"] = "auto"
    control_variate: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        put(
            self,
            batch_size=FEWEST_BATCH if self.batch_size == "auto" and self.step_size != "auto" else self.batch_size,
            step_size=check_automatic("step_size", self.step_size, above=0.0),
            friction=check_automatic("friction", self.friction, above=0.0),
            control_variate=check_flag("control_variate", self.control_variate),
        )


class BAOABChain(SteppingChain):
    """One chain from w*, its velocity from N(0, I). `carried`: `velocity` and the `force` at the weights, [P] each."""

    def __init__(self, around: Surroundings, sampler: BAOAB, chain: int) -> None:
        super().__init__(around, sampler, chain, control_variate=sampler.control_variate)
        self.sampler = sampler
        self._zero = torch.zeros_like(self.task.flat)

    def begin(self) -> None:
        velocity = normals(self.around.seed, self.chain, 0, self.task.num_weights, stream=STREAM)
        self.carried["velocity"] = velocity.to(self.task.device)
        self.carried["force"] = torch.zeros_like(self.task.flat)
        self._renew_force(0)

    def advance(self) -> float:
        """One step; returns L_B(w) - L_B(w*) at the weights after it, where its one gradient is taken."""
        velocity, force = self.carried["velocity"], self.carried["force"]
        h = float(self.sampler.step_size)
        with self.around.timings.measure("step"):
            velocity.add_(force, alpha=-h / 2)
            self.task.flat.add_(velocity, alpha=h / 2)
            self._thermostat(math.exp(-float(self.sampler.friction) * h))
            self.task.flat.add_(velocity, alpha=h / 2)
        excess = self._renew_force(self.step + 1)
        velocity.add_(force, alpha=-h / 2)
        self.step += 1
        return excess

    @property
    def reach(self) -> float:
        return float(self.sampler.step_size)

    def _thermostat(self, c: float) -> None:
        """v <- c v + sqrt(1 - c^2) xi, which is an SGLD step of v: lr = 1 - c^2 and a pull 2 / (1 + c) towards 0."""
        sgld_step(
            self.carried["velocity"],
            self._zero,
            self._zero,
            lr=1.0 - c * c,
            n_beta=0.0,
            localization=2.0 / (1.0 + c),
            seed=self.around.seed,
            chain=self.chain,
            step=self.step,
            backend=self.around.backend,
        )

    def _renew_force(self, minibatch: int) -> float:
        """F = n_beta g_B(w) + localization (w - w*) into `carried`; returns L_B(w) - L_B(w*)."""
        excess = self.gradient(minibatch)
        force = self.carried["force"]
        torch.sub(self.task.flat, self.task.anchor, out=force).mul_(self.localization)
        force.add_(self.task.grad, alpha=self.n_beta)
        return excess

    def diverged(self, what: str) -> DivergedError:
        h = float(self.sampler.step_size)
        return DivergedError(
            f"chain {self.chain} diverged at step {self.step}: {what}, "
            f"mean loss at the trained weights {float(self.around.anchor_losses.mean()):.4g}; "
            f"try step_size={h / 3:.2g} instead of {h:.2g}, or a larger localization than {self.localization:.3g}"
        )
