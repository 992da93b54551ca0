"""The pilot's measurements: the largest curvature of the training loss and the largest gradient variance.

At w*, and again at typical draws of the trial chain: a trained network's curvature grows severalfold away from w*."""

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

PILOT_SAMPLES = 512
FEWER_SAMPLES, FEWER_ITERATIONS = 64, 8  # where nothing is chosen by what they say
FEWEST_SAMPLES, FEWEST_ITERATIONS = 32, 4  # where that would be more than a share of the run's own passes
DRAWN_SAMPLES, DRAWN_ITERATIONS = 256, 10  # at each of a few draws
SHARE = 0.02
PASSES_PER_ITERATION = 11  # forward passes' worth: three gradients for 3 each, and two of losses
PILOT_BATCH = 128
ITERATIONS = 16
CONVERGED = 0.02  # relative change between power iterations
STREAM = 2
PILOT_CHAIN = 2**32 - 1  # of the counter-based minibatches: no chain of a run has this number


@dataclass(frozen=True, kw_only=True)
class Pilot:
    """What the pilot measured at w*, and the trial chain at its draws."""

    curvature: float  # h_max, the largest eigenvalue of the Hessian of L_n (0 if there is no positive one)
    gradient_variance: float  # lambda_max(Cov g) over per-sample gradients
    n_beta: float
    batch_factor: float  # f: variance of a minibatch mean over the per-sample variance
    num_samples: int  # training samples used
    control_variance: float | None = None  # lambda_max(Cov(g_i(w) - g_i(w*))) at a typical w of the trial chain
    control_localization: float | None = None  # the trial's
    drawn_curvature: float | None = None  # h_max at typical draws of the trial chain
    drawn_variance: float | None = None  # lambda_max(Cov g) likewise

    @property
    def steepest(self) -> float:
        """The larger of the curvatures at w* and at typical draws: what a step must be stable for."""
        return max(self.curvature, self.drawn_curvature or 0.0)

    def stability_share(self, sampler: SGLD) -> float:
        """eps a_max / 4 of a resolved sampler, at its largest gain; averaged noise needs less than 1."""
        lr, localization = float(sampler.lr) * sampler.gain, float(sampler.localization)
        return lr * (self.n_beta * self.steepest + localization) / 4.0

    def discretisation(self, sampler: SGLD) -> float:
        """eps a_max / 4 of a resolved sampler; with a preconditioner, at its largest gain: an upper bound.

        Its square for averaged noise, whose error is of second order (and zero in a quadratic).
        """
        first_order = self.stability_share(sampler)
        return first_order**2 if sampler.averaged else first_order

    def noise_ratio(self, sampler: SGLD) -> float:
        """eps n_beta^2 f lambda_max / 4, likewise; with a control variate, of what it leaves."""
        controlled = sampler.control_variate is True
        return float(sampler.lr) * sampler.gain * self.noise_per_lr(controlled, float(sampler.localization))

    def noise_per_lr(self, controlled: bool, localization: float) -> float:
        """n_beta^2 f lambda_max / 4. What a control variate leaves goes as the spread around w*, 1 / localization."""
        variance = max(self.gradient_variance, self.drawn_variance or 0.0)
        if controlled:
            variance = 0.0
            if self.control_variance is not None and self.control_localization is not None:
                variance = self.control_variance * self.control_localization / max(localization, 1e-30)
        return self.n_beta**2 * self.batch_factor * variance / 4.0

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def default_n_beta(num_train: int) -> float:
    """n / ln n, n the number of training samples, or unmasked tokens (Watanabe's inverse temperature 1 / ln n)."""
    return num_train / math.log(max(num_train, 3))


def run_pilot(task: Task, train: Samples, sampler: SGLD, *, seed: int, run_passes: float = math.inf) -> Pilot:
    """Measure the largest curvature and the largest gradient variance on up to 512 training samples.

    On 64 where every setting is a number, and only the verdict reads them; on 32, with fewer iterations, where the run
    itself is short (`run_passes`, in forward passes of one sample). By power iteration; products are central
    differences of gradients and losses. Double backward would serve no better: not every operation has one, and some
    silently give zero.
    """
    n = len(train)
    m = n if sampler.batch_size is None else min(sampler.batch_size, n)
    settings = (sampler.lr, sampler.localization, sampler.num_burnin_steps, sampler.num_steps_bw_draws)
    most, iterations = (PILOT_SAMPLES, ITERATIONS) if "auto" in settings else (FEWER_SAMPLES, FEWER_ITERATIONS)
    if "auto" not in settings and most * iterations * PASSES_PER_ITERATION > SHARE * run_passes:
        most, iterations = FEWEST_SAMPLES, FEWEST_ITERATIONS
    products = _Products(task, train, seed, most)
    start = normals(seed, 0, 0, task.num_weights, stream=STREAM).to(task.device)
    curvature = _largest_eigenvalue(products.hessian, start, iterations)
    variance = _largest_eigenvalue(products.gradient_covariance, start, iterations)
    return Pilot(
        curvature=max(curvature, 0.0),
        gradient_variance=max(variance, 0.0),
        n_beta=sampler.n_beta if sampler.n_beta is not None else default_n_beta(task.loss.num_terms(n)),
        batch_factor=(n - m) / (m * (n - 1)) if n > 1 else 0.0,
        num_samples=products.total,
    )


def drawn_curvature(task: Task, train: Samples, *, seed: int) -> float:
    """h_max on up to 256 training samples at the present weights w."""
    products = _Products(task, train, seed, DRAWN_SAMPLES)
    start = normals(seed, 0, 0, task.num_weights, stream=STREAM).to(task.device)
    return max(_largest_eigenvalue(products.hessian, start, DRAWN_ITERATIONS), 0.0)


def drawn_variance(task: Task, train: Samples, *, seed: int) -> float:
    """lambda_max(Cov g) on up to 256 training samples at the present weights w."""
    products = _Products(task, train, seed, DRAWN_SAMPLES)
    start = normals(seed, 0, 0, task.num_weights, stream=STREAM).to(task.device)
    return max(_largest_eigenvalue(products.gradient_covariance, start, DRAWN_ITERATIONS), 0.0)


def control_variance(task: Task, train: Samples, *, seed: int) -> float:
    """lambda_max(Cov(g_i(w) - g_i(w*))) over up to 512 training samples, at the present weights w."""
    products = _Products(task, train, seed, PILOT_SAMPLES)
    start = normals(seed, 0, 0, task.num_weights, stream=STREAM).to(task.device)
    return max(_largest_eigenvalue(products.controlled_covariance, start), 0.0)


class _Products:
    """Hessian-vector and gradient-covariance-vector products of the mean loss over some batches, on flat vectors."""

    def __init__(self, task: Task, train: Samples, seed: int, most: int) -> None:
        subset = Minibatches(len(train), most, seed=seed, chain=PILOT_CHAIN)[0]
        self.task, self.total = task, len(subset)
        parts = subset.split(fitting_batch(PILOT_BATCH, task.loss.positions))
        self.batches, self.sizes = [train[part] for part in parts], [len(part) for part in parts]
        self.center = task.flat.clone()  # [P] where the derivatives are taken

    def hessian(self, v: Tensor) -> Tensor:
        """H v = (grad L(w + s v) - grad L(w - s v)) / 2s."""
        step = self._difference_step(v)
        ahead, behind = (self._at(v, s, self._mean_gradient) for s in (step, -step))
        return (ahead - behind) / (2 * step)

    def _mean_gradient(self) -> Tensor:
        out = torch.zeros_like(self.task.flat)
        for batch, size in zip(self.batches, self.sizes, strict=True):
            with torch.enable_grad():
                out += self._gradient(self.task.loss.mean(self.task.network, batch)) * (size / self.total)
        return out

    def _gradient(self, scalar: Tensor) -> Tensor:
        parts = torch.autograd.grad(scalar, self.task.sampled, materialize_grads=True)
        return self.task.flatten(parts)

    def gradient_covariance(self, v: Tensor) -> Tensor:
        """Cov(g) v = (1/B) sum_i (g_i'v - mean) g_i, the directional derivatives g_i'v by central differences."""
        return self._weighted_gradient(self._centred_slopes(v))

    def controlled_covariance(self, v: Tensor) -> Tensor:
        """Cov(d) v with d_i = g_i(w) - g_i(w*)."""
        here = self._centred_slopes(v)
        try:
            center, self.center = self.center, self.task.anchor
            self.task.reset()
            here = here - self._centred_slopes(v)
            there = self._weighted_gradient(here)
        finally:
            self.center = center
            self.task.flat.copy_(center)
        return self._weighted_gradient(here) - there

    def _centred_slopes(self, v: Tensor) -> Tensor:
        """[B] float64: g_i'v less its mean."""
        step = self._difference_step(v)
        ahead, behind = (self._at(v, s, self._all_losses) for s in (step, -step))
        slopes = (ahead - behind) / (2 * step)
        return slopes - slopes.mean()

    def _weighted_gradient(self, slopes: Tensor) -> Tensor:
        """(1/B) sum_i slope_i g_i at the present weights."""
        weights = (slopes / self.total).float()
        out = torch.zeros_like(self.task.flat)
        for batch, weight in zip(self.batches, weights.split(self.sizes), strict=True):
            with torch.enable_grad():
                losses = self.task.loss.per_sample(self.task.network, batch)
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
            self.task.flat.copy_(self.center)


def _largest_eigenvalue(product: Callable[[Tensor], Tensor], start: Tensor, iterations: int = ITERATIONS) -> float:
    """The algebraically largest eigenvalue of a symmetric operator, by power iteration (shifted if need be)."""
    value = _power_iteration(product, start, iterations)
    if value >= 0:
        return value
    shift = abs(value)  # the dominant eigenvalue is negative: iterate on A + |value| I
    return _power_iteration(lambda v: product(v) + shift * v, start, iterations) - shift


def _power_iteration(product: Callable[[Tensor], Tensor], start: Tensor, iterations: int) -> float:
    v, value = start / start.norm(), 0.0
    for _ in range(iterations):
        image = product(v)
        before, value = value, float(v @ image)
        norm = float(image.norm())
        if not math.isfinite(norm):
            raise ValueError("model: derivatives of the loss are not finite")
        if norm == 0.0 or abs(value - before) <= CONVERGED * abs(value):
            break
        v = image / norm
    return value
