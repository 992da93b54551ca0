"""A chain by itself, stepped by a test, and the corrected step written out: float64, one gradient per sample."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import lossk
from lossk.data.minibatches import Minibatches
from lossk.data.reading import read_samples
from lossk.ops.philox import normals
from lossk.samplers.chain import Surroundings
from lossk.samplers.force import FULL_GRADIENT, full_gradient
from lossk.samplers.sgld import SGLDChain
from lossk.task.losses import resolve_loss
from lossk.task.passes import Passes
from lossk.task.task import Task
from lossk.timings import Timings

Array = np.ndarray
Data = tuple[Tensor, Tensor]


@contextmanager
def stepped(
    model: nn.Module, data: Data, loss: Any, sampler: lossk.SGLD, *, backend: str = "cpp", seed: int = 0,
    chain: int = 0, precision: str | None = None, gradient_batch: int = 1024, mean_tokens: float | None = None,
) -> Iterator[SGLDChain]:  # fmt: skip
    """Chain number `chain` at w*."""
    resolved = resolve_loss(loss, backend)
    if mean_tokens is not None:
        resolved = resolved.over_tokens(round(mean_tokens * len(data[0])), len(data[0]), data[1].shape[1])
    task = Task(model, resolved, precision=precision)
    task.passes = Passes(gradient_batch=gradient_batch)
    train = read_samples(data)
    with task:
        losses = task.losses(train[torch.arange(len(train))]).double()
        fitted = {FULL_GRADIENT: full_gradient(task, train)} if sampler.control_variate is True else {}
        around = Surroundings(task, train, losses, seed, backend, Timings(), fitted=fitted)
        yield SGLDChain(around, sampler, chain)


def noise_of(sampler: lossk.SGLD, seed: int, chain: int, step: int, size: int) -> Array:
    """[P] eta of a step."""
    xi = [normals(seed, chain, step + after, size).double().numpy() for after in (0, 1)]
    return (xi[0] + xi[1]) / 2 if sampler.averaged else xi[0]


class Reference:
    """A chain's training samples, their losses and the step, in float64."""

    def __init__(self, model: nn.Module, data: Data, loss: Any) -> None:
        self.model, self.data, self.loss = copy.deepcopy(model).double(), data, loss
        self.anchor = self.weights()

    def weights(self) -> Array:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()]).numpy().copy()

    def losses_at(self, w: Array, index: Tensor) -> Tensor:
        """[m] float64, with their graph."""
        with torch.no_grad():
            nn.utils.vector_to_parameters(torch.from_numpy(w.copy()), self.model.parameters())
        return self.loss(self.model, (self.data[0][index], self.data[1][index]))

    def gradients_at(self, w: Array, index: Tensor) -> Array:
        """[m, P]: one backward pass per sample."""
        parameters = list(self.model.parameters())
        rows = [
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True)])
            for loss in self.losses_at(w, index)
        ]
        return torch.stack(rows).numpy()

    def step(self, w: Array, sampler: lossk.SGLD, seed: int, chain: int, step: int) -> Array:
        """w - (lr/2) [n_beta g + localization (w - w*)] + sqrt(lr) (eta - kappa C_B eta), C_B formed."""
        n, m = len(self.data[0]), int(sampler.batch_size or 0)
        index = Minibatches(n, m, seed=seed, chain=chain)[step]
        lr, n_beta = float(sampler.lr), float(sampler.n_beta or 0.0)
        each, mean = self.gradients_at(w, index), 0.0
        if sampler.control_variate is True:
            each = each - self.gradients_at(self.anchor, index)
            mean = self.gradients_at(self.anchor, torch.arange(n)).mean(axis=0)
        eta = noise_of(sampler, seed, chain, step, len(w))
        covariance = np.atleast_2d(np.cov(each.T, ddof=1))
        kappa = sampler.correction * lr * n_beta**2 * (1 / m - 1 / n) / 8
        drift = n_beta * (each.mean(axis=0) + mean) + float(sampler.localization) * (w - self.anchor)
        return w - lr / 2 * drift + np.sqrt(lr) * (eta - kappa * covariance @ eta)
