"""Stochastic gradient Langevin dynamics around the trained weights.

    w <- w - (lr/2) [ n_beta grad L_B(w) + localization (w - w*) ] + sqrt(lr) xi,   xi ~ N(0, I)

whose stationary law is, up to discretisation and minibatch noise,

    p(w) ~ exp( -n_beta L_n(w) - localization/2 |w - w*|^2 )

(Welling and Teh 2011; the localised form of Lau et al., arXiv 2308.12108; devinterp's convention of the step size).

That step (Euler's) makes the variance of a mode of curvature a too large by lr a / 4. With the noise of two consecutive
steps averaged, sqrt(lr) (xi_t + xi_{t+1}) / 2 (Leimkuhler and Matthews 2013, "Rational construction of stochastic
numerical methods for molecular sampling", the high-friction limit of BAOAB), the law of a quadratic is exact at every
stable step, lr a < 4, and the error elsewhere is of second order: the step can be several times longer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor

from lossk.checks import check_automatic, check_choice, check_flag, check_number, plain_scalar
from lossk.errors import DivergedError
from lossk.ops.sgld_step import sgld_step
from lossk.samplers.chain import Surroundings
from lossk.samplers.correction import Correction
from lossk.samplers.metropolis import Energy, mala_acceptance
from lossk.samplers.stepping import SteppingChain
from lossk.settings import FEWEST_BATCH, SteppingSettings, put

PRECONDITIONERS = (None, "rmsprop", "rmsprop-frozen")
EULER: Final = "euler"
AVERAGED: Final = "leimkuhler-matthews"
INTEGRATORS = ("auto", EULER, AVERAGED)
ALPHA, STABILITY = 0.99, 0.1  # of the RMSprop preconditioner


@dataclass(frozen=True, kw_only=True)
class SGLD(SteppingSettings):
    """Sampler settings; "auto" values are chosen by a pilot before sampling, printed, and saved with the result.

    Args:
        lr: step size epsilon, or "auto".
        n_beta: n times the inverse temperature; None is n / ln n with n the number of *training* samples (of a loss per
            token: of unmasked training tokens).
        localization: gamma, the strength of the pull towards w*, or "auto".
        metric: in which |w - w*| is measured: None, all weights alike; or "fisher", each parameter tensor in units of
            its own, 1 / sqrt of its mean Fisher diagonal at w* (`lossk.curvature.metric`), so that the law is the same
            for networks that compute the same function with layers of another scale. localization="fisher" is short for
            "auto" with this metric.
        batch_size: minibatch size; None or at least n is the full gradient. "auto" takes 256, 512, ... or all samples,
            whichever costs least at a foreseen bias within 5 % (`lossk.diagnostics.bias`); 256 where lr is a number.
        num_burnin_steps: steps before the first draw's own steps, per chain, or "auto".
        num_steps_bw_draws: steps from one draw to the next, or "auto".
        preconditioner: None; "rmsprop" (alpha 0.99, stability 0.1, no bias correction; devinterp's convention), whose
            stationary law is not known in closed form, because it leaves out the correction term for a preconditioner
            that moves with the weights (Li et al. 2016, eq. 7); or "rmsprop-frozen", the same until the end of burn-in
            and constant from then on, so that the law is p(w) up to discretisation and minibatch noise.
        integrator: "euler", the step above, or "leimkuhler-matthews", whose noise is averaged over two steps: no bias
            in a quadratic, and where lr is "auto" a step up to nine times as long. Without preconditioner only. "auto"
            averages where lr is "auto" too; an lr that is a number means the step above, as published ones do.
        control_variate: take g_B(w) - g_B(w*) + g_n(w*) for the minibatch gradient (Baker et al. 2019, arXiv
            1706.05439): the same mean, little noise near w*, twice the cost of a step. "auto" lets the pilot decide
            where lr is "auto" too, and is False where lr is a number.
        noise_correction: inject less noise where the minibatch gradient has brought some of its own, by an estimate of
            that from the minibatch itself: the modified SGLD of Vollmer, Zygalakis and Teh 2016, "Exploration of the
            (Non-)Asymptotic Bias and Variance of Stochastic Gradient Langevin Dynamics", JMLR 17. Most of what
            minibatch noise adds to a variance goes, for a third more passes a step. True takes it back to first order
            in lr; a number is the strength, of which True is 1 (`lossk.diagnostics.bias` says which is best for a
            step). Without preconditioner, and for minibatches of at least 2. "auto" is False where lr is a number.
        measure_acceptance: also measure, at each draw, the acceptance that a Metropolis test would give a fresh
            full-batch step of this lr: near 1 where the step is short enough. Two full gradients more per draw.
        params: shell-style patterns of the parameter names to sample; None is every parameter that requires grad.
        pilot_budget: what pilot and trial chains may cost, as a share of the run's own foreseen passes; None is 0.25,
            and 0.03 where every setting is a number. Some seconds are always allowed. Where that does not pay for
            everything, settings are rough, and the reasons say so (`lossk.pilot.effort`).

    Raises:
        ValueError, TypeError: naming the argument, the rule and the value.
    """

    lr: float | Literal["auto"] = "auto"
    preconditioner: Literal["rmsprop", "rmsprop-frozen"] | None = None
    integrator: Literal["auto", "euler", "leimkuhler-matthews"] = "auto"
    control_variate: bool | Literal["auto"] = "auto"
    noise_correction: bool | float | Literal["auto"] = "auto"
    measure_acceptance: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        put(
            self,
            batch_size=FEWEST_BATCH if self.batch_size == "auto" and self.lr != "auto" else self.batch_size,
            lr=check_automatic("lr", self.lr, above=0.0),
            preconditioner=check_choice("preconditioner", self.preconditioner, PRECONDITIONERS),
            control_variate=check_choice("control_variate", self.control_variate, (True, False, "auto")),
            noise_correction=check_correction(self.noise_correction),
            measure_acceptance=check_flag("measure_acceptance", self.measure_acceptance),
            integrator=check_choice("integrator", self.integrator, INTEGRATORS),
        )
        if self.averaged and self._needs_euler is not None:
            given = self._needs_euler
            raise ValueError(f"integrator={AVERAGED!r} goes without {given}, got {getattr(self, given)!r}")

        if self.correction and self.preconditioner is not None:
            raise ValueError(
                f"noise_correction={self.noise_correction!r} goes without preconditioner, got {self.preconditioner!r}"
            )
        if self.correction and self.batch_size == 1:
            raise ValueError(
                f"noise_correction={self.noise_correction!r} needs minibatches of at least 2, whose gradients can be "
                "compared, got batch_size=1"
            )

    @property
    def has_auto(self) -> bool:
        """Whether anything is left to be chosen: of a given lr, no noise correction."""
        open_ones = [name for name, value in self.to_dict().items() if value == "auto"]
        return bool(open_ones) and (self.lr == "auto" or open_ones != ["noise_correction"])

    @property
    def correction(self) -> float:
        """The strength of the noise correction; 0 for none, or for one that is yet to be chosen."""
        return 0.0 if self.noise_correction == "auto" else float(self.noise_correction)

    @property
    def _needs_euler(self) -> str | None:
        """The setting that averaged noise cannot go with, if one is given."""
        if self.preconditioner is not None:
            return "preconditioner"
        return "measure_acceptance" if self.measure_acceptance else None

    @property
    def averaged(self) -> bool:
        """Whether a step's noise is averaged with the next one's."""
        if self.integrator == "auto":
            return self.lr == "auto" and self._needs_euler is None
        return self.integrator == AVERAGED

    @property
    def gain(self) -> float:
        """The largest factor by which the preconditioner can multiply a step: 1 / stability, or 1 without one."""
        return 1.0 if self.preconditioner is None else 1.0 / STABILITY


def check_correction(value: Any) -> bool | float | Any:
    """True, False, "auto" or a strength of at least 0."""
    plain = plain_scalar(value)
    if isinstance(plain, bool):
        return plain
    if isinstance(plain, str):
        return check_choice("noise_correction", plain, ("auto",))
    return check_number("noise_correction", plain, "True, False, 'auto' or a number", least=0.0)


class SGLDChain(SteppingChain):
    """One SGLD chain from w*."""

    def __init__(self, around: Surroundings, sampler: SGLD, chain: int) -> None:
        super().__init__(around, sampler, chain, control_variate=bool(sampler.control_variate))
        self.sampler = sampler
        self._corrects = sampler.correction > 0 and self.force.draws_minibatches
        self._move = torch.empty_like(self.task.flat) if self._corrects else None

    def begin(self) -> None:
        if self.sampler.preconditioner is not None:
            self.carried["square_avg"] = torch.zeros_like(self.task.flat)

    @property
    def reach(self) -> float:
        return math.sqrt(float(self.sampler.lr))

    @property
    def _frozen(self) -> bool:
        return self.sampler.preconditioner == "rmsprop-frozen" and self.step >= self.num_burnin_steps

    def advance(self) -> float:
        """One SGLD step; returns L_B(w) - L_B(w*) at the weights before it."""
        excess = self.gradient(self.step, self._correction())
        lr = float(self.sampler.lr)
        with self.around.timings.measure("step"):
            if self.sampler.averaged:  # half of this step's noise with the drift, then half of the next one's
                self._step(self.step, lr / 4, 4 * self.n_beta, 4 * self.localization)
                self._step(self.step + 1, lr / 4, 0.0, 0.0)
            else:
                self._step(self.step, lr, self.n_beta, self.localization)
        self.step += 1
        return excess

    def _correction(self) -> Correction | None:
        """Of this step's noise, by its minibatch."""
        if self._move is None:
            return None
        self._move.zero_()
        lr, sign = float(self.sampler.lr), 1 - 2 * (self.step % 2)
        if self.sampler.averaged:
            self._step(self.step, lr / 4, 0.0, 0.0, self._move)
            self._step(self.step + 1, lr / 4, 0.0, 0.0, self._move)
        else:
            self._step(self.step, lr, 0.0, 0.0, self._move)
        return Correction(self._move.mul_(sign), sign * self.sampler.correction * self.n_beta)

    def _step(self, step: int, lr: float, n_beta: float, localization: float, moved: Tensor | None = None) -> None:
        """w <- w - (lr/2) [n_beta g + localization (w - w*)] + sqrt(lr) xi_step; of `moved` instead, if given."""
        sgld_step(
            self.task.flat if moved is None else moved,
            self.task.grad,
            self.task.anchor,
            lr=lr,
            n_beta=n_beta,
            localization=localization,
            seed=self.around.seed,
            chain=self.chain,
            step=step,
            backend=self.around.backend,
            square_avg=self.carried.get("square_avg"),
            alpha=ALPHA,
            stability=STABILITY,
            update_square_avg=not self._frozen,
        )

    def acceptance(self) -> float:
        """Of a Metropolis test of a full-batch step with this lr (and preconditioner), where it was asked for."""
        if not self.sampler.measure_acceptance:
            return math.nan
        energy = Energy(self.task, self.around.train, n_beta=self.n_beta, localization=self.localization)
        gain: Tensor | float = 1.0
        if "square_avg" in self.carried:
            gain = (self.carried["square_avg"].sqrt() + STABILITY).rsqrt()
        with self.around.timings.measure("acceptance"):
            return mala_acceptance(
                energy,
                lr=float(self.sampler.lr),
                seed=self.around.seed,
                chain=self.chain,
                step=self.step,
                root_gain=gain,
            )

    def diverged(self, what: str) -> DivergedError:
        lr = float(self.sampler.lr)
        return DivergedError(
            f"chain {self.chain} diverged at step {self.step}: {what}, "
            f"mean loss at the trained weights {float(self.around.anchor_losses.mean()):.4g}; "
            f"try lr={lr / 8:.2g} instead of {lr:.2g}, or a larger localization than {self.sampler.localization:.3g}"
        )
