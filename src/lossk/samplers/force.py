"""The minibatch gradient of a chain, plain or with a control variate."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lossk.data.data import Samples
from lossk.data.minibatches import Minibatches
from lossk.ranks.mesh import deal_batches
from lossk.ranks.world import ALONE, World
from lossk.samplers.chain import Surroundings
from lossk.samplers.correction import Correction
from lossk.task.task import Task

FULL_GRADIENT = "full_gradient"  # [P] float32, the gradient of L_n at w*, among what a sampler's `fit` returns
PART = 1024  # samples whose gradient is one float32 vector, before the sum
FEWEST_BLOCKS, MOST_BLOCKS = 8, 64  # of the sum, however many ranks share them: more ranks have nothing to do
TRAVELLING = 2**32  # bytes of all blocks, each of which every rank receives, above which there are fewer


class MinibatchForce:
    """Leaves the gradient of a step's minibatch in `task.grad`.

    With a control variate it is g_B(w) - g_B(w*) + g_n(w*): unbiased like g_B(w), and its variance falls with the
    distance from w*, where the two minibatch gradients differ little (Baker, Fearnhead, Fox, Nemeth 2019, arXiv
    1706.05439, eq. 8).
    """

    def __init__(self, around: Surroundings, batch_size: int | None, chain: int, *, control_variate: bool) -> None:
        self.task, self.train = around.task, around.train
        self.anchor_losses = around.anchor_losses  # their minibatch mean is a control variate of the loss
        self.minibatches = Minibatches(len(around.train), batch_size, seed=around.seed, chain=chain)
        self.control = around.fitted[FULL_GRADIENT] if control_variate and self.draws_minibatches else None
        self._here = torch.empty_like(self.task.flat) if self.control is not None else None

    @property
    def draws_minibatches(self) -> bool:
        """Whether gradients are of fewer than all samples."""
        return self.minibatches.batch_size < self.minibatches.num_samples

    def gradient(self, step: int, correction: Correction | None = None) -> tuple[float, float]:
        """(L_B(w), L_B(w) - L_B(w*)) for the step's minibatch; its gradient is in `task.grad`.

        Args:
            correction: of the step's noise, which becomes part of the gradient; of minibatches only.
        """
        index = self.minibatches[step]
        at_anchor = self.anchor_losses[index]
        weights: Tensor | None = None
        if correction is None:
            loss = self.task.gradient(self.train, index)
        else:
            controlled = None if self.control is None else at_anchor
            given = correction.weights(self.task, self.train, index, controlled)
            loss, weights = self.task.weighted_gradient(self.train, index, given)
            if not bool(torch.isfinite(weights).all()):
                loss = math.nan  # at the weights, or where the noise moves them
        if self.control is not None and self._here is not None:
            self._subtract_anchor(index, self._here, self.control, weights)
        return loss, loss - float(at_anchor.mean())

    def _subtract_anchor(self, index: Tensor, here: Tensor, control: Tensor, weights: Tensor | None) -> None:
        flat = self.task.flat.clone()
        here.copy_(self.task.grad)
        self.task.reset()
        try:
            if weights is None:
                self.task.gradient(self.train, index)
            else:
                self.task.weighted_gradient(self.train, index, weights)
        finally:
            self.task.flat.copy_(flat)
        torch.sub(here, self.task.grad, out=self.task.grad)
        self.task.grad += control


def full_gradient(task: Task, samples: Samples, world: World = ALONE) -> Tensor:
    """[P] float32: the gradient of L_n at the present weights, summed in float64, first within blocks of samples.

    Args:
        world: its ranks share the blocks; each adds up all in the same order: to the bit what one process finds.
    """
    total = torch.zeros(task.num_weights, dtype=torch.float64, device=task.device)
    count = min(max(TRAVELLING // (8 * task.num_weights), FEWEST_BLOCKS), MOST_BLOCKS)
    blocks = [block for block in deal_batches(len(samples), PART, count) if block.start < block.stop]
    for first in range(0, len(blocks), world.size):
        at_once = blocks[first : first + world.size]
        own = torch.zeros_like(total)
        if world.rank < len(at_once):
            _add_gradients(task, samples, at_once[world.rank], own)
        for owner in range(len(at_once)):
            total += world.broadcast(own, owner)
    return total.float()


def _add_gradients(task: Task, samples: Samples, block: slice, total: Tensor) -> None:
    for part in torch.arange(block.start, block.stop, device="cpu").split(PART):
        task.gradient(samples, part)
        total += task.grad.double() * (len(part) / len(samples))
