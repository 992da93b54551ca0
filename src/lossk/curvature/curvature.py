"""Curvature and gradient noise at the present weights, by Lanczos iteration on derivatives that are differences.

Products are central differences of gradients and losses. Double backward would serve no better: not every operation has
one, and some silently give zero.

Over a few samples the largest eigenvalue of the mean of their matrices comes out too large (it is a convex function of
that mean: half as much again or more over 32 samples), and its vector's quotient over others too small. Where one
eigenvalue leads, the two errors are equal and opposite to first order (second-order perturbation theory of the
sampling error). To choose a step by, the first is on the safe side; to judge one, `held_out=True` takes the middle.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypedDict, Unpack

import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from lossk.data.data import Samples
from lossk.data.minibatches import Minibatches
from lossk.ops.philox import normals
from lossk.task.task import Task, fitting_batch

MOST_SAMPLES, ITERATIONS = 512, 10
DRAWN_SAMPLES, DRAWN_ITERATIONS = 256, 10  # at each of a few draws
BATCH = 128
CONVERGED = 0.1  # relative residual of the Ritz pair
STREAM = 2
PILOT_CHAIN = 2**32 - 1  # of the counter-based minibatches: no chain of a run has this number


class Sample(TypedDict, total=False):
    """Which training samples a largest eigenvalue is measured on, and how."""

    most: int  # of them
    which: int  # random subset of that many
    held_out: bool  # the middle of the subset's own and of its vector's quotient, as many others included
    iterations: int
    across: float  # a difference reaches so far to each side, if that is more than a thousandth of the weights' norm


def largest_curvature(task: Task, train: Samples, *, seed: int, **sample: Unpack[Sample]) -> float:
    """h_max on up to `most` training samples (256)."""
    return _largest(Products.hessian, task, train, seed, **sample)


def gradient_variance(task: Task, train: Samples, *, seed: int, **sample: Unpack[Sample]) -> float:
    """lambda_max(Cov g) on up to `most` training samples (256)."""
    return _largest(Products.gradient_covariance, task, train, seed, **sample)


def control_variance(task: Task, train: Samples, *, seed: int, **sample: Unpack[Sample]) -> float:
    """lambda_max(Cov(g_i(w) - g_i(w*))) on up to `most` training samples (512)."""
    sample.setdefault("most", MOST_SAMPLES)
    return _largest(Products.controlled_covariance, task, train, seed, **sample)


def _largest(
    product: Callable[[Products, Tensor], Tensor], task: Task, train: Samples, seed: int, most: int = DRAWN_SAMPLES,
    which: int = 0, held_out: bool = False, iterations: int = DRAWN_ITERATIONS, across: float = 0.0,
) -> float:  # fmt: skip
    start = normals(seed, 0, 0, task.num_weights, stream=STREAM).to(task.device)
    both = Minibatches(len(train), 2 * most if held_out else most, seed=seed, chain=PILOT_CHAIN)[which]
    if not held_out or len(both) <= most:
        return max(largest_eigenvalue(partial(product, Products(task, train, both, across)), start, iterations), 0.0)
    half = Minibatches(len(both), -(-len(both) // 2), seed=seed, chain=PILOT_CHAIN)[which]
    within = torch.zeros(len(both), dtype=torch.bool, device="cpu").index_fill_(0, half, True)
    inside, outside = both[within], both[~within]
    value, vector = leading_pair(partial(product, Products(task, train, inside, across)), start, iterations)
    there = float(vector @ product(Products(task, train, outside, across), vector))
    share = len(inside) / len(train)
    return max((value + share * value + (1 - share) * there) / 2, 0.0)


# With `across` as far as a step's noise moves one direction: what lies within it, a step does not feel one by one. Over
# less, the kinks of a ReLU network make the curvature over few samples vary ninefold where that of a step's varies by
# 1.7, and automatic runs without bias were told that their step was too large.
GLANCE: Sample = {"most": 64, "iterations": 4}  # one subset: how curvature varies over draws, not how large it is
PASSES_PER_ITERATION = 11  # forward passes of a sample, of both products: three gradients for 3 each, two of losses
GLANCE_PASSES = GLANCE["most"] * GLANCE["iterations"] * PASSES_PER_ITERATION


FAR = 3.09  # normal deviate of the 99.9 % quantile


def steepness(glances: Tensor) -> float:
    """The 99.9 % quantile of some draws' curvatures over their mean, at least 1; [k], NaN where there was none.

    No run looks at a thousand draws: it is that of a log-normal law as wide as the draws above the median are. Those
    below are left out, for a loss that steepens in few directions may have a heavy tail above alone.
    """
    seen = glances[torch.isfinite(glances)].double()
    if not len(seen) or not float(seen.mean()) > 0:
        return 1.0
    median = float(seen.quantile(0.5))
    if median <= 0.0:
        return max(float(seen.max() / seen.mean()), 1.0)
    above = (seen[seen > median] / median).log()
    wide = float(above.square().mean().sqrt()) if len(above) else 0.0
    return max(median * math.exp(FAR * wide) / float(seen.mean()), 1.0)


class Products:
    """Hessian-vector and gradient-covariance-vector products of the mean loss over some samples, on flat vectors."""

    def __init__(self, task: Task, train: Samples, subset: Tensor, across: float = 0.0) -> None:
        self.task, self.total, self.across = task, len(subset), across
        parts = subset.split(fitting_batch(min(BATCH, task.passes.gradient_batch), task.loss.positions))
        self.train, self.parts, self.sizes = train, parts, [len(part) for part in parts]
        self.center = task.flat.clone()  # [P] where the derivatives are taken

    def _batches(self) -> Iterator[Any]:
        """Cut anew for each pass: held, they would be a second copy of the samples."""
        return (self.train[part] for part in self.parts)

    def hessian(self, v: Tensor) -> Tensor:
        """H v = (grad L(w + s v) - grad L(w - s v)) / 2s."""
        step = self._difference_step(v)
        ahead, behind = (self._at(v, s, self._mean_gradient) for s in (step, -step))
        return ahead.sub_(behind).div_(2 * step)

    def _mean_gradient(self) -> Tensor:
        out = torch.zeros_like(self.task.flat)
        for batch, size in zip(self._batches(), self.sizes, strict=True):
            with torch.enable_grad():
                part = self._gradient(self.task.loss.mean(self.task.network, batch))
            out += part.mul_(size / self.total)
        return out

    def _gradient(self, scalar: Tensor) -> Tensor:
        parts = torch.autograd.grad(scalar, self.task.sampled, materialize_grads=True)
        return self.task.pull_back(self.task.flatten(parts))

    def gradient_covariance(self, v: Tensor) -> Tensor:
        """Cov(g) v = (1/B) sum_i (g_i'v - mean) g_i, the directional derivatives g_i'v by central differences."""
        return self._weighted_gradient(self._centered_slopes(v))

    def controlled_covariance(self, v: Tensor) -> Tensor:
        """Cov(d) v with d_i = g_i(w) - g_i(w*)."""
        here = self._centered_slopes(v)
        try:
            center, self.center = self.center, self.task.anchor
            self.task.reset()
            here = here - self._centered_slopes(v)
            there = self._weighted_gradient(here)
        finally:
            self.center = center
            self.task.flat.copy_(center)
        return self._weighted_gradient(here).sub_(there)

    def _centered_slopes(self, v: Tensor) -> Tensor:
        """[B] float64: g_i'v less its mean."""
        step = self._difference_step(v)
        ahead, behind = (self._at(v, s, self._all_losses) for s in (step, -step))
        slopes = (ahead - behind) / (2 * step)
        return slopes - slopes.mean()

    def _weighted_gradient(self, slopes: Tensor) -> Tensor:
        """(1/B) sum_i slope_i g_i at the present weights."""
        weights = (slopes / self.total).float()
        out = torch.zeros_like(self.task.flat)
        for batch, weight in zip(self._batches(), weights.split(self.sizes), strict=True):
            with torch.enable_grad():
                losses = self.task.loss.per_sample(self.task.network, batch)
                out += self._gradient(losses @ weight)
        return out

    def _all_losses(self) -> Tensor:
        return torch.cat([self.task.losses(batch) for batch in self._batches()]).double()

    def _difference_step(self, v: Tensor) -> float:
        """A move of a thousandth of the weights' norm: float32 losses resolve it, and curvature hardly changes."""
        move = max(1e-3 * (float(self.task.anchor.norm()) + 1e-3), self.across)
        return move / max(float(v.norm()), 1e-30)

    def _at(self, v: Tensor, step: float, evaluate: Callable[[], Tensor]) -> Tensor:
        self.task.flat.add_(v, alpha=step)
        try:
            return evaluate()
        finally:
            self.task.flat.copy_(self.center)


def lanczos(
    product: Callable[[Tensor], Tensor], start: Tensor
) -> Iterator[tuple[Tensor, list[float], list[float], float]]:
    """Lanczos iteration (1950) on a symmetric operator, for as long as it is asked for.

    Yields the unit vector [P] of the last product (overwritten by the next), the diagonal and what stands beside it of
    the tridiagonal matrix, and the norm of what the next vector is made of. Nothing is orthogonalised again: lost
    orthogonality repeats extreme values, it does not move them (Paige 1980), and three vectors are all that is held.

    Raises:
        ValueError: derivatives of the loss are not finite.
    """
    before, v = torch.zeros_like(start), start / start.norm()
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        image = product(v)
        diagonal.append(float(v @ image))
        if not math.isfinite(diagonal[-1]):
            raise ValueError("model: derivatives of the loss are not finite")
        image -= diagonal[-1] * v
        image -= before.mul_(beside[-1] if beside else 0.0)
        norm = float(image.norm())
        yield v, diagonal, beside, norm
        beside.append(norm)
        before, v = v, image.div_(norm)


def largest_eigenvalue(product: Callable[[Tensor], Tensor], start: Tensor, iterations: int = ITERATIONS) -> float:
    """The algebraically largest eigenvalue of a symmetric operator.

    A large negative eigenvalue does not hide it, as it does from power iteration.
    """
    return _largest_ritz(product, start, iterations)[0]


def leading_pair(
    product: Callable[[Tensor], Tensor], start: Tensor, iterations: int = ITERATIONS
) -> tuple[float, Tensor]:
    """That eigenvalue and its unit vector, for which all of the iteration's vectors are held, in bfloat16.

    Their rounding, of one in 500 at most in each element, adds as much of noise to the vector.
    """
    basis: list[Tensor] = []
    value, weights = _largest_ritz(product, start, iterations, lambda v: basis.append(v.bfloat16()))
    vector = torch.zeros_like(start)
    for weight, v in zip(weights, basis, strict=True):
        vector += v.to(vector.dtype).mul_(weight)
    return value, vector.div_(vector.norm())


def _largest_ritz(
    product: Callable[[Tensor], Tensor], start: Tensor, iterations: int, keep: Callable[[Tensor], None] | None = None
) -> tuple[float, list[float]]:
    """The largest Ritz value, and its vector in terms of the basis whose vectors `keep` is given one by one."""
    for v, diagonal, beside, norm in lanczos(product, start):
        if keep is not None:
            keep(v)
        values, vectors = eigh_tridiagonal(diagonal, beside)
        residual = norm * abs(float(vectors[-1, -1]))  # an eigenvalue is as near; as a rule nearer by its square
        if len(diagonal) == iterations or residual <= CONVERGED * abs(float(values[-1])):
            return float(values[-1]), vectors[:, -1].tolist()
    raise AssertionError("the iteration has no end of its own")
