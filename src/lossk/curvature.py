"""Curvature and gradient noise at the present weights, by Lanczos iteration on derivatives that are differences.

Products are central differences of gradients and losses. Double backward would serve no better: not every operation has
one, and some silently give zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from lossk.data import Samples
from lossk.minibatches import Minibatches
from lossk.ops.philox import normals
from lossk.task import Task, fitting_batch

MOST_SAMPLES, ITERATIONS = 512, 10
DRAWN_SAMPLES, DRAWN_ITERATIONS = 256, 10  # at each of a few draws
BATCH = 128
CONVERGED = 0.1  # relative residual of the Ritz pair
STREAM = 2
PILOT_CHAIN = 2**32 - 1  # of the counter-based minibatches: no chain of a run has this number


def largest_curvature(
    task: Task, train: Samples, *, seed: int, most: int = DRAWN_SAMPLES, iterations: int = DRAWN_ITERATIONS
) -> float:
    """h_max on up to `most` training samples."""
    products = Products(task, train, seed, most)
    return max(largest_eigenvalue(products.hessian, _start(task, seed), iterations), 0.0)


def gradient_variance(
    task: Task, train: Samples, *, seed: int, most: int = DRAWN_SAMPLES, iterations: int = DRAWN_ITERATIONS
) -> float:
    """lambda_max(Cov g) on up to `most` training samples."""
    products = Products(task, train, seed, most)
    return max(largest_eigenvalue(products.gradient_covariance, _start(task, seed), iterations), 0.0)


def control_variance(task: Task, train: Samples, *, seed: int) -> float:
    """lambda_max(Cov(g_i(w) - g_i(w*))) on up to 512 training samples."""
    products = Products(task, train, seed, MOST_SAMPLES)
    return max(largest_eigenvalue(products.controlled_covariance, _start(task, seed)), 0.0)


def _start(task: Task, seed: int) -> Tensor:
    return normals(seed, 0, 0, task.num_weights, stream=STREAM).to(task.device)


class Products:
    """Hessian-vector and gradient-covariance-vector products of the mean loss over some batches, on flat vectors."""

    def __init__(self, task: Task, train: Samples, seed: int, most: int) -> None:
        subset = Minibatches(len(train), most, seed=seed, chain=PILOT_CHAIN)[0]
        self.task, self.total = task, len(subset)
        parts = subset.split(fitting_batch(BATCH, task.loss.positions))
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


def largest_eigenvalue(product: Callable[[Tensor], Tensor], start: Tensor, iterations: int = ITERATIONS) -> float:
    """The algebraically largest eigenvalue of a symmetric operator, by Lanczos iteration (1950).

    A large negative eigenvalue does not hide it, as it does from power iteration. Nothing is orthogonalised again: lost
    orthogonality repeats extreme values, it does not move them (Paige 1980), and three vectors are all that is held.
    """
    before, v = torch.zeros_like(start), start / start.norm()
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        image = product(v)
        diagonal.append(float(v @ image))
        if not math.isfinite(diagonal[-1]):
            raise ValueError("model: derivatives of the loss are not finite")
        values, vectors = eigh_tridiagonal(diagonal, beside)
        image = image - diagonal[-1] * v - (beside[-1] if beside else 0.0) * before
        norm = float(image.norm())
        residual = norm * abs(float(vectors[-1, -1]))  # an eigenvalue is as near; as a rule nearer by its square
        if len(diagonal) == iterations or residual <= CONVERGED * abs(float(values[-1])):
            return float(values[-1])
        beside.append(norm)
        before, v = v, image / norm
