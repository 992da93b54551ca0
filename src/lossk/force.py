"""The minibatch gradient of a chain, plain or with a control variate."""

from __future__ import annotations

import torch
from torch import Tensor

from lossk.chain import Surroundings
from lossk.data import Samples
from lossk.minibatches import Minibatches
from lossk.task import Task

FULL_GRADIENT = "full_gradient"  # [P] float32, the gradient of L_n at w*, among what a sampler's `fit` returns


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
        full = batch_size is None or batch_size >= len(around.train)
        self.control = around.fitted[FULL_GRADIENT] if control_variate and not full else None
        self._here = torch.empty_like(self.task.flat) if self.control is not None else None

    def gradient(self, step: int) -> tuple[float, float]:
        """(L_B(w), L_B(w) - L_B(w*)) for the step's minibatch; its gradient is in `task.grad`."""
        index = self.minibatches[step]
        loss = self.task.gradient(self.train, index)
        if self.control is not None and self._here is not None:
            self._subtract_anchor(index, self._here, self.control)
        return loss, loss - float(self.anchor_losses[index].mean())

    def _subtract_anchor(self, index: Tensor, here: Tensor, control: Tensor) -> None:
        weights = self.task.flat.clone()
        here.copy_(self.task.grad)
        self.task.reset()
        try:
            self.task.gradient(self.train, index)
        finally:
            self.task.flat.copy_(weights)
        torch.sub(here, self.task.grad, out=self.task.grad)
        self.task.grad += control


def full_gradient(task: Task, samples: Samples) -> Tensor:
    """[P] float32: the gradient of L_n at the present weights, summed in float64."""
    total = torch.zeros(task.num_weights, dtype=torch.float64, device=task.device)
    everything = torch.arange(len(samples))
    for part in everything.split(1024):
        task.gradient(samples, part)
        total += task.grad.double() * (len(part) / len(samples))
    return total.float()
