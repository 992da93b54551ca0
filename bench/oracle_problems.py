"""What the oracles share: rows of the table, and linear regression, whose chain-centered kernel is known exactly.

Every problem is run as R copies with weights of their own: the training loss is the sum over copies, so each copy is
the same chain with independent noise, and one chain's estimate is the mean over its copies.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import lossk

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import oracles as closed

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Size:
    """How long to run; the problems are the same."""

    chains: int
    draws: int  # per chain
    seed: int
    long: bool  # whether cases that need long chains are run

    def part(self, number: int, **changes: Any) -> Size:
        """The same with a seed of its own, for part `number` of a case or of the table."""
        seed = int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0])
        return replace(self, seed=seed, **changes)


@dataclass(frozen=True)
class Row:
    oracle: str
    quantity: str
    truth: float
    estimate: float
    se: float

    @property
    def z(self) -> float:
        return (self.estimate - self.truth) / self.se


def rows(oracle: str, names: list[str], truth: Any, estimate: Any, chains: Array) -> list[Row]:
    """One row per name. chains [C, names]: each chain's own error or estimate, whose spread gives the error."""
    se = chains.std(axis=0, ddof=1) / np.sqrt(len(chains))
    return [Row(oracle, *map(_plain, row)) for row in zip(names, truth, estimate, se, strict=True)]


def _plain(value: Any) -> Any:
    return value if isinstance(value, str) else float(value)


class Copies(nn.Module):
    """Weights [R, d], every copy at w*."""

    def __init__(self, w_star: Array, copies: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(np.tile(w_star, (copies, 1)), dtype=torch.float32))


def square_loss(model: Any, batch: Any) -> Tensor:
    """Training rows (x, y): 1/2 (x'w - y)^2 summed over copies; probe rows (x, y, copy): of that copy."""
    if len(batch) == 2:
        return 0.5 * (batch[0] @ model.weight.T - batch[1].unsqueeze(1)).square().sum(1)
    return 0.5 * ((batch[0] * model.weight[batch[2]]).sum(1) - batch[1]).square()


def linear_loss(model: Any, batch: Any) -> Tensor:
    """The same training loss; the probe "loss" is x'w itself, so that K = x S x' is the covariance of the weights."""
    return square_loss(model, batch) if len(batch) == 2 else (batch[0] * model.weight[batch[2]]).sum(1)


def float32(x: Array) -> Array:
    """What float32 holds is the problem; the closed form takes it as exact."""
    return x.astype(np.float32).astype(np.float64)


def tensors(x: Array, y: Array, copies: int) -> tuple[Tensor, Tensor, Tensor]:
    """The q probe rows for every copy, copy after copy."""
    index = torch.arange(copies).repeat_interleave(len(x))
    return torch.tensor(x).float().repeat(copies, 1), torch.tensor(y).float().repeat(copies), index


def of_copies(k: Array, copies: int) -> Array:
    """[R q, R q] -> [q, q]: the mean of the diagonal blocks."""
    q = len(k) // copies
    return np.einsum("rirj->ij", k.reshape(copies, q, copies, q).astype(np.float64)) / copies


def of_chains(losses: Tensor, copies: int) -> Array:
    """The same of each chain's own chain-centered kernel, from its traces: [C, q, q]."""
    x = losses.double().numpy()
    x = (x - x.mean(axis=1, keepdims=True)).reshape(*x.shape[:2], copies, -1)
    return np.einsum("ctri,ctrj->cij", x, x) / (copies * (x.shape[1] - 1))


@dataclass(frozen=True)
class Regression:
    """n training rows, q probe rows, w* off the fit unless `fitted`."""

    x: Array
    y: Array
    probe: Array
    answer: Array
    w_star: Array
    stiffness: float  # eps times the largest curvature; 4 is the limit of stability
    n_beta: float = 60.0
    gamma: float = 20.0
    thin: int = 2
    burnin: int = 60
    batch_size: int | None = None
    copies: int = 16

    @classmethod
    def make(cls, stiffness: float, *, d: int = 3, n: int = 24, fitted: bool = False, **changes: Any) -> Regression:
        rng = np.random.default_rng(11)
        x, probe, w = (float32(rng.standard_normal(shape)) for shape in ((n, d), (6, d), d))
        y = float32(x @ w + rng.standard_normal(n))
        fit = np.linalg.lstsq(x, y, rcond=None)[0]
        w_star = fit if fitted else float32(w + 0.3 * rng.standard_normal(d))
        answer = float32(probe @ w + rng.standard_normal(6))
        return cls(x, y, probe, answer, w_star, stiffness, **changes)

    @property
    def a(self) -> Array:
        return closed.posterior_precision(self.x, self.n_beta, self.gamma)

    @property
    def lr(self) -> float:
        return float(self.stiffness / np.linalg.eigvalsh(self.a)[-1])

    def arguments(self, loss: Any, size: Size, preconditioner: Any = None) -> dict[str, Any]:
        return {
            "model": Copies(self.w_star, self.copies),
            "loader": tensors(self.probe, self.answer, self.copies),
            "train": (torch.tensor(self.x).float(), torch.tensor(self.y).float()),
            "loss": loss,
            "sampler": lossk.SGLD(
                lr=self.lr,
                n_beta=self.n_beta,
                localization=self.gamma,
                batch_size=self.batch_size,
                num_burnin_steps=self.burnin,
                num_steps_bw_draws=self.thin,
                preconditioner=preconditioner,
            ),
            "num_chains": size.chains,
            "num_draws": size.draws,
            "seed": size.seed,
            "progress": False,
        }

    def sample(self, loss: Any, size: Size) -> tuple[Array, Array]:
        """(K, K of each chain), both as the mean over copies: [q, q], [C, q, q]."""
        traces = lossk.sample_losses(**self.arguments(loss, size))
        k = lossk.LossKernel.from_traces(traces).to_numpy()
        return of_copies(k, self.copies), of_chains(traces.losses, self.copies)

    def truth(self, s: Array, draws: int, *, linear: bool) -> Array:
        """E of the chain-centered K [q, q] of stationary chains with covariance s: T1 at every lag, T4's centering."""
        b = np.linalg.matrix_power(np.eye(len(s)) - self.lr / 2 * self.a, self.thin)
        mu = closed.posterior_mean(self.x, self.y, self.w_star, self.n_beta, self.gamma)
        lags = [s]
        for _ in range(draws - 1):
            lags.append(lags[-1] @ b)
        residual = self.answer - self.probe @ mu
        if linear:
            return closed.centered_expectation(np.stack([self.probe @ c @ self.probe.T for c in lags]))
        return closed.centered_expectation(
            np.stack([closed.regression_covariance(self.probe, residual, c) for c in lags])
        )
