"""What a Metropolis test needs: the exact energy with its gradient, leapfrog steps, and the acceptance of a MALA step.

    U(w) = n_beta L_n(w) + localization/2 |w - w*|^2,    H(w, p) = U(w) + |p|^2 / 2

Losses of all n training samples are float32, their mean and everything else of an energy float64. An energy is then
wrong by about n_beta 6e-8 times the mean loss (less where the samples' rounding errors cancel), which must be small
against 1 for a test to be exact: with a mean loss of 1 nat, n_beta up to about a million.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lossk.data.data import Samples
from lossk.ops.philox import normals
from lossk.task.task import Task, fitting_batch

STREAM = 5  # of the Philox counter: proposals whose acceptance is measured and that are never taken


class Energy:
    """U of one task's training samples."""

    def __init__(self, task: Task, train: Samples, *, n_beta: float, localization: float) -> None:
        self.task, self.train = task, train
        self.n_beta, self.localization = n_beta, localization

    def gradient(self, out: Tensor) -> float:
        """Write grad U at the present weights into `out` [P] float32; returns L_n(w), nats."""
        task, n, total = self.task, len(self.train), 0.0
        parts = torch.arange(n, device="cpu").split(fitting_batch(task.passes.gradient_batch, task.loss.positions))
        for number, part in enumerate(parts):
            with torch.enable_grad(), task.autocast():
                losses = task.loss.per_sample(task.network, self.train[part])
                task.differentiate(losses.sum() / n, add=number > 0)
            total += float(losses.detach().double().sum())
        torch.sub(task.flat, task.anchor, out=out).mul_(self.localization).add_(task.grad, alpha=self.n_beta)
        return total / n

    def value(self, loss: float) -> float:
        """U at the present weights, given L_n there."""
        square = float((self.task.flat.double() - self.task.anchor.double()).square().sum())
        return self.n_beta * loss + self.localization / 2 * square

    def leapfrog(
        self, momentum: Tensor, force: Tensor, *, step_size: float, num_steps: int, root_gain: Tensor | float = 1.0
    ) -> float:
        """`num_steps` leapfrog steps of the weights, `momentum` and `force` = grad U, all in place; returns L_n.

        root_gain: square root of the diagonal of the inverse mass matrix, which scales forces and moves alike.
        """
        loss = math.nan
        momentum.sub_(force * root_gain, alpha=step_size / 2)
        for number in range(num_steps):
            self.task.flat.add_(momentum * root_gain, alpha=step_size)
            loss = self.gradient(force)
            last = number == num_steps - 1
            momentum.sub_(force * root_gain, alpha=step_size / 2 if last else step_size)
        return loss


def kinetic(momentum: Tensor) -> float:
    """|p|^2 / 2 in float64."""
    return 0.5 * float(momentum.double().square().sum())


def probability(rise: float) -> float:
    """min(1, exp(-rise)); 0 for a rise that is not a number, which only a trajectory that left for infinity has."""
    if math.isnan(rise):
        return 0.0
    return math.exp(-max(rise, 0.0))


def mala_acceptance(
    energy: Energy, *, lr: float, seed: int, chain: int, step: int, root_gain: Tensor | float = 1.0
) -> float:
    """The acceptance that a Metropolis test would give a fresh full-batch SGLD step from the present weights.

    w' = w - (lr/2) G grad U(w) + sqrt(lr G) xi is the proposal of MALA (Roberts and Tweedie 1996), which is one
    leapfrog step of size sqrt(lr) with p = xi; its acceptance is min(1, exp(H(w, p) - H(w', p'))). Noise of its own
    (stream 5). Two full-batch gradients; the weights are back bitwise afterwards, `task.grad` is not.
    """
    task = energy.task
    weights = task.flat.clone()
    force = torch.empty_like(weights)
    momentum = normals(seed, chain, step, task.num_weights, stream=STREAM).to(task.device)
    try:
        before = energy.value(energy.gradient(force)) + kinetic(momentum)
        loss = energy.leapfrog(momentum, force, step_size=math.sqrt(lr), num_steps=1, root_gain=root_gain)
        return probability(energy.value(loss) + kinetic(momentum) - before)
    finally:
        task.flat.copy_(weights)
