"""The pilot: measures curvature and gradient noise at w*, and fills in every "auto" of the sampler with its reason.

Budgets (math: relative excess variance of a mode of curvature a is eps a / 4; minibatch noise over injected noise in
its worst direction is eps n_beta^2 f lambda_max(Cov g) / 4 with f = (n - m) / (m (n - 1))):

    discretisation   eps (n_beta h_max + gamma) / 4 <= 0.05
    gradient noise   eps n_beta^2 f lambda_max / 4  <= 0.25

Flat directions, which only the localization pulls back, are the slowest: they forget at rate eps gamma / 2 per step.
Burn-in takes them to 99 % of their stationary variance, and draws are spaced for a lag-1 autocorrelation of 1/e.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lossk.data import Samples
from lossk.minibatches import Minibatches
from lossk.ops.philox import normals
from lossk.sgld import SGLD
from lossk.task import Task, fitting_batch

DISCRETISATION_BUDGET = 0.05
NOISE_BUDGET = 0.25
LAG1_TARGET = math.exp(-1.0)
BURNIN_TARGET = 0.99
LOCAL_RADIUS = 0.25  # of the weights' norm: how far a chain may wander when nothing else ties it down
FEWEST_STEPS, MOST_STEPS = 20, 50  # between draws, when localization is free to be chosen
STEPS_CAP = 500  # between draws, when it is not
BURNIN_CAP = 20_000
PILOT_SAMPLES = 512
PILOT_BATCH = 128
ITERATIONS = 16
CONVERGED = 0.02  # relative change between power iterations
STREAM = 2
PILOT_CHAIN = 2**32 - 1  # of the counter-based minibatches: no chain of a run has this number


@dataclass(frozen=True, kw_only=True)
class Pilot:
    """What the pilot measured at w*."""

    curvature: float  # h_max, the largest eigenvalue of the Hessian of L_n (0 if there is no positive one)
    gradient_variance: float  # lambda_max(Cov g) over per-sample gradients
    n_beta: float
    batch_factor: float  # f: variance of a minibatch mean over the per-sample variance
    num_samples: int  # training samples used

    def discretisation(self, sampler: SGLD) -> float:
        """eps a_max / 4 of a resolved sampler; with a preconditioner, at its largest gain: an upper bound."""
        lr, localization = float(sampler.lr) * sampler.gain, float(sampler.localization)
        return lr * (self.n_beta * self.curvature + localization) / 4.0

    def noise_ratio(self, sampler: SGLD) -> float:
        """eps n_beta^2 f lambda_max / 4, likewise."""
        return float(sampler.lr) * sampler.gain * self.noise_per_lr

    @property
    def noise_per_lr(self) -> float:
        """n_beta^2 f lambda_max / 4."""
        return self.n_beta**2 * self.batch_factor * self.gradient_variance / 4.0

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def default_n_beta(num_train: int) -> float:
    """n / ln n, n the number of training samples, or unmasked tokens (Watanabe's inverse temperature 1 / ln n)."""
    return num_train / math.log(max(num_train, 3))


def run_pilot(task: Task, train: Samples, sampler: SGLD, *, seed: int) -> Pilot:
    """Measure the largest curvature and the largest gradient variance on up to 512 training samples.

    By power iteration; products are central differences of gradients and losses. Double backward would serve no
    better: not every operation has one, and some silently give zero.
    """
    n = len(train)
    m = n if sampler.batch_size is None else min(sampler.batch_size, n)
    subset = Minibatches(n, PILOT_SAMPLES, seed=seed, chain=PILOT_CHAIN)[0]
    parts = subset.split(fitting_batch(PILOT_BATCH, task.loss.positions))
    batches, sizes = [train[part] for part in parts], [len(part) for part in parts]
    products = _Products(task, batches, sizes)
    start = normals(seed, 0, 0, task.num_weights, stream=STREAM).to(task.device)
    curvature = _largest_eigenvalue(products.hessian, start)
    variance = _largest_eigenvalue(products.gradient_covariance, start)
    return Pilot(
        curvature=max(curvature, 0.0),
        gradient_variance=max(variance, 0.0),
        n_beta=sampler.n_beta if sampler.n_beta is not None else default_n_beta(task.loss.num_terms(n)),
        batch_factor=(n - m) / (m * (n - 1)) if n > 1 else 0.0,
        num_samples=len(subset),
    )


class _Products:
    """Hessian-vector and gradient-covariance-vector products of the mean loss over some batches, on flat vectors."""

    def __init__(self, task: Task, batches: list[Any], sizes: list[int]) -> None:
        self.task, self.batches, self.sizes = task, batches, sizes
        self.total = sum(sizes)

    def hessian(self, v: Tensor) -> Tensor:
        """H v = (grad L(w + s v) - grad L(w - s v)) / 2s."""
        step = self._difference_step(v)
        ahead, behind = (self._at(v, s, self._mean_gradient) for s in (step, -step))
        return (ahead - behind) / (2 * step)

    def _mean_gradient(self) -> Tensor:
        out = torch.zeros_like(self.task.flat)
        for batch, size in zip(self.batches, self.sizes, strict=True):
            with torch.enable_grad():
                out += self._gradient(self.task.loss.mean(self.task.model, batch)) * (size / self.total)
        return out

    def _gradient(self, scalar: Tensor) -> Tensor:
        parts = torch.autograd.grad(scalar, self.task.sampled, materialize_grads=True)
        return self.task.flatten(parts)

    def gradient_covariance(self, v: Tensor) -> Tensor:
        """Cov(g) v = (1/B) sum_i (g_i'v - mean) g_i, the directional derivatives g_i'v by central differences."""
        step = self._difference_step(v)
        ahead, behind = (self._at(v, s, self._all_losses) for s in (step, -step))
        slopes = (ahead - behind) / (2 * step)
        weights = ((slopes - slopes.mean()) / self.total).float()
        out = torch.zeros_like(v)
        for batch, weight in zip(self.batches, weights.split(self.sizes), strict=True):
            with torch.enable_grad():
                losses = self.task.loss.per_sample(self.task.model, batch)
                out += self._gradient(losses @ weight)
        return out

    def _all_losses(self) -> Tensor:
        return torch.cat([self.task.losses(batch) for batch in self.batches]).double()

    def _difference_step(self, v: Tensor) -> float:
        """A move of a thousandth of the weights' norm: float32 losses resolve it, and curvature hardly changes."""
        return 1e-3 * (float(self.task.anchor.norm()) + 1e-3) / max(float(v.norm()), 1e-30)

    def _at(self, v: Tensor, step: float, evaluate: Callable[[], Tensor]) -> Tensor:
        self.task.flat.add_(v, alpha=step)
        try:
            return evaluate()
        finally:
            self.task.reset()


def _largest_eigenvalue(product: Callable[[Tensor], Tensor], start: Tensor) -> float:
    """The algebraically largest eigenvalue of a symmetric operator, by power iteration (shifted if need be)."""
    value = _power_iteration(product, start)
    if value >= 0:
        return value
    shift = abs(value)  # the dominant eigenvalue is negative: iterate on A + |value| I
    return _power_iteration(lambda v: product(v) + shift * v, start) - shift


def _power_iteration(product: Callable[[Tensor], Tensor], start: Tensor) -> float:
    v, value = start / start.norm(), 0.0
    for _ in range(ITERATIONS):
        image = product(v)
        before, value = value, float(v @ image)
        norm = float(image.norm())
        if not math.isfinite(norm):
            raise ValueError("model: derivatives of the loss at the trained weights are not finite")
        if norm == 0.0 or abs(value - before) <= CONVERGED * abs(value):
            break
        v = image / norm
    return value


def choose_settings(
    sampler: SGLD, pilot: Pilot, task: Task, *, num_probe: int, num_train: int
) -> tuple[SGLD, list[str]]:
    """Fill in every "auto"; returns the resolved sampler and one line of reason per choice."""
    reasons: list[str] = []
    n_beta = pilot.n_beta
    if sampler.n_beta is None:
        reasons.append(
            f"n_beta = {n_beta:.4g}: n / ln n of the {task.loss.num_terms(num_train)} training {task.loss.unit}"
        )
    stiff = n_beta * pilot.curvature
    m = num_train if sampler.batch_size is None else min(sampler.batch_size, num_train)
    steps = _steps_worth_a_draw(sampler, num_probe, m)
    # Budgets are kept at the preconditioner's largest gain, which is also what flat directions have: there V is small.
    gain = sampler.gain
    noise_lr = NOISE_BUDGET / pilot.noise_per_lr if pilot.noise_per_lr > 0 else math.inf

    if sampler.localization == "auto":
        localization, why = _choose_localization(sampler, stiff, noise_lr, steps, task)
        reasons.append(f"localization = {localization:.4g}: {why}")
    else:
        localization = float(sampler.localization)

    if sampler.lr == "auto":
        step_lr = 4 * DISCRETISATION_BUDGET / (stiff + localization) if stiff + localization > 0 else math.inf
        lr = min(step_lr, noise_lr)
        if not math.isfinite(lr):
            raise ValueError("lr='auto' needs a loss with curvature or localization > 0; give lr= as a number")
        lr /= gain
        if step_lr <= noise_lr:
            why = f"discretisation budget {DISCRETISATION_BUDGET:.0%} at curvature {stiff + localization:.3g}"
        else:
            why = f"gradient-noise budget {NOISE_BUDGET:.2g} (discretisation alone would allow {step_lr:.2g})"
        if gain != 1.0:
            why += f", at the preconditioner's largest gain {gain:.3g}"
        reasons.append(f"lr = {lr:.3g}: {why}")
    else:
        lr = float(sampler.lr)

    pull = lr * gain * localization
    if pull <= 0 and "auto" in (sampler.num_burnin_steps, sampler.num_steps_bw_draws):
        raise ValueError(
            "num_burnin_steps and num_steps_bw_draws must be numbers when localization is 0: flat directions then have "
            f"no stationary spread to burn in to, got {sampler.num_burnin_steps!r} and {sampler.num_steps_bw_draws!r}"
        )
    if sampler.num_burnin_steps != "auto":
        burnin = int(sampler.num_burnin_steps)
    else:
        burnin = min(math.ceil(-math.log(1 - BURNIN_TARGET) / pull), BURNIN_CAP)
        reached = 1 - (1 - pull / 2) ** (2 * burnin)
        reasons.append(f"num_burnin_steps = {burnin}: flat directions reach {reached:.0%} of their stationary variance")
    if sampler.num_steps_bw_draws != "auto":
        thinning = int(sampler.num_steps_bw_draws)
    else:
        thinning = max(1, min(math.ceil(-2 * math.log(LAG1_TARGET) / pull), STEPS_CAP))
        lag1 = float(abs(1 - pull / 2) ** thinning)
        reasons.append(
            f"num_steps_bw_draws = {thinning}: flat directions keep autocorrelation {lag1:.2f} between draws"
        )
    resolved = dataclasses.replace(
        sampler,
        lr=lr,
        n_beta=n_beta,
        localization=localization,
        num_burnin_steps=burnin,
        num_steps_bw_draws=thinning,
        control_variate=sampler.control_variate is True,
    )
    return resolved, reasons


def _steps_worth_a_draw(sampler: SGLD, num_probe: int, batch_size: int) -> int:
    """Steps that cost about as much as one probe pass (a step's backward costs two forwards), within 20 to 50."""
    if sampler.num_steps_bw_draws != "auto":
        return max(int(sampler.num_steps_bw_draws), FEWEST_STEPS)
    return min(max(round(num_probe / (3 * batch_size)), FEWEST_STEPS), MOST_STEPS)


def _choose_localization(sampler: SGLD, stiff: float, noise_lr: float, steps: int, task: Task) -> tuple[float, str]:
    """The smallest pull at which flat directions decorrelate within `steps` and weights stay local.

    Both budgets bound lr; wanted is lr gamma = 2 / steps with lr at the tighter of the two, that is
    gamma = 2 / (steps noise_lr) or gamma = stiff / (2 B steps - 1) with B the discretisation budget.
    """
    if sampler.lr != "auto":
        mixing = 2.0 / (steps * float(sampler.lr) * sampler.gain)
    else:
        from_step = stiff / (2 * DISCRETISATION_BUDGET * steps - 1)
        from_noise = 2.0 / (steps * noise_lr) if math.isfinite(noise_lr) else 0.0
        mixing = max(from_step, from_noise)
    norm = float(task.anchor.norm())
    local = task.num_weights / (LOCAL_RADIUS * norm) ** 2 if norm > 0 else 0.0
    if mixing == local == 0.0:
        return 1.0, "no curvature, gradient noise or weight norm to choose it by"
    if mixing >= local:
        return mixing, f"flat directions then forget within {steps} steps, about the cost of a probe pass"
    radius = (task.num_weights / local) ** 0.5
    return local, f"keeps the weights within about {radius:.3g} of w*, {LOCAL_RADIUS:.0%} of its norm"
