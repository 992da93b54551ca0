"""T1 to T6: linear regression, whose chain-centred kernel is known exactly, discretisation and minibatches included.

Every problem is run as R copies with weights of their own: the training loss is the sum over copies, so each copy is
the same chain with independent noise, and one chain's estimate is the mean over its copies.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import lossk
from lossk.ops.philox import normals

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import oracles as closed

Array = NDArray[np.float64]
BIASED = closed.discretised_covariance  # what the tests replace by the unbiased one, to see the table fail


@dataclass(frozen=True)
class Size:
    """How long to run; the problems are the same."""

    chains: int
    draws: int  # per chain
    seed: int
    long: bool  # whether cases that need long chains are run


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
    """The same of each chain's own chain-centred kernel, from its traces: [C, q, q]."""
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
        """E of the chain-centred K [q, q] of stationary chains with covariance s: T1 at every lag, T4's centring."""
        b = np.linalg.matrix_power(np.eye(len(s)) - self.lr / 2 * self.a, self.thin)
        mu = closed.posterior_mean(self.x, self.y, self.w_star, self.n_beta, self.gamma)
        lags = [s]
        for _ in range(draws - 1):
            lags.append(lags[-1] @ b)
        residual = self.answer - self.probe @ mu
        if linear:
            return closed.centred_expectation(np.stack([self.probe @ c @ self.probe.T for c in lags]))
        return closed.centred_expectation(
            np.stack([closed.regression_covariance(self.probe, residual, c) for c in lags])
        )


def t1(size: Size) -> list[Row]:
    """Quadratic losses through build_kernel; eps a_max / 4 = 5 %."""
    case = Regression.make(0.2, thin=6, burnin=100)
    k = of_copies(lossk.build_kernel(**case.arguments(square_loss, size)).to_numpy(), case.copies)
    chains = of_chains(lossk.sample_losses(**case.arguments(square_loss, size)).losses, case.copies)
    return _entries("T1 quadratic losses", k, chains, case.truth(BIASED(case.a, case.lr), size.draws, linear=False))


def _entries(oracle: str, k: Array, chains: Array, truth: Array) -> list[Row]:
    pick = lambda m: np.stack([np.trace(m, axis1=-2, axis2=-1), m[..., 0, 0], m[..., 1, 4]], axis=-1)  # noqa: E731
    return rows(oracle, ["trace K", "K[0, 0]", "K[1, 4]"], pick(truth), pick(k), pick(chains))


def t2(size: Size) -> list[Row]:
    """A step so long that the stiffest variance is 2.5 times too large; then the excess of tr S per step at two steps."""
    case = Regression.make(2.4)
    k, chains = case.sample(square_loss, size)
    out = _entries("T2 long step", k, chains, case.truth(BIASED(case.a, case.lr), size.draws, linear=False))
    for number, stiffness in enumerate((0.5, 1.0)):
        case = Regression.make(stiffness, thin=3, burnin=100, copies=64)
        eye = np.eye(3)
        case = Regression(**{**case.__dict__, "probe": eye, "answer": np.zeros(3)})
        k, chains = case.sample(linear_loss, Size(size.chains, size.draws, size.seed + 1 + number, size.long))
        # The centring shrinks S as it does its estimate; the unbiased law's share of the expectation is taken off.
        exact = case.truth(np.linalg.inv(case.a), size.draws, linear=True)
        truth = case.truth(BIASED(case.a, case.lr), size.draws, linear=True)
        excess = lambda m, exact=exact, lr=case.lr: np.trace(m - exact, axis1=-2, axis2=-1)[..., None] / lr  # noqa: E731
        name = f"tr(S_eps - S) / eps, eps a_max = {stiffness}"
        out += rows("T2 bias is proportional to eps", [name], excess(truth), excess(k), excess(chains))
    return out


def t2_frozen(size: Size) -> list[Row]:
    """RMSprop frozen after burn-in: S = (A - eps/4 A G A)^-1 for each chain's and copy's own G, from a replay of V."""
    skip = 20  # draws, after which the frozen chain has forgotten the burn-in
    case = Regression.make(0.25, thin=3, burnin=150)
    case = Regression(**{**case.__dict__, "probe": np.eye(3), "answer": np.zeros(3)})
    longer = Size(size.chains, size.draws + skip, size.seed, size.long)
    whole = lossk.sample_losses(**case.arguments(linear_loss, longer, "rmsprop-frozen"))
    traces = lossk.LossTraces(whole.losses[:, skip:])
    k = of_copies(lossk.LossKernel.from_traces(traces).to_numpy(), case.copies)
    chains = of_chains(traces.losses, case.copies)
    truth = np.stack([_frozen_truth(case, size, chain) for chain in range(size.chains)])
    pick = lambda m: np.stack([np.trace(m, axis1=-2, axis2=-1), m[..., 0, 0], m[..., 0, 1]], axis=-1)  # noqa: E731
    names = ["tr S", "S[0, 0]", "S[0, 1]"]
    return rows("T2 RMSprop frozen", names, pick(truth).mean(0), pick(k), pick(chains) - pick(truth))


def _frozen_truth(case: Regression, size: Size, chain: int) -> Array:
    """E of the chain-centred S [d, d] given the preconditioner that this chain froze, mean over copies."""
    h, shape = case.x.T @ case.x / len(case.x), (case.copies, len(case.w_star))
    w, v = np.tile(case.w_star, (case.copies, 1)), np.zeros(shape)
    for step in range(case.burnin):
        grad = w @ h - case.x.T @ case.y / len(case.x)
        v = 0.99 * v + 0.01 * grad**2
        gain = 1 / (np.sqrt(v) + 0.1)
        xi = normals(size.seed, chain, step, w.size).double().numpy().reshape(shape)
        drift = case.n_beta * grad + case.gamma * (w - case.w_star)
        w = w - case.lr / 2 * gain * drift + np.sqrt(case.lr * gain) * xi
    g = (1 / (np.sqrt(v) + 0.1))[:, :, None] * np.eye(shape[1])
    s = np.linalg.inv(case.a - case.lr / 4 * case.a @ g @ case.a)
    b = np.linalg.matrix_power(np.eye(shape[1]) - case.lr / 2 * g @ case.a, case.thin)
    lags = [s]
    for _ in range(size.draws - 1):
        lags.append(b @ lags[-1])
    return closed.centred_expectation(np.stack(lags).mean(axis=1))


def t3(size: Size) -> list[Row]:
    """Minibatches of 10 of 20 without replacement, their noise as large as the injected noise."""
    case = Regression.make(0.8, n=20, fitted=True, gamma=10.0, batch_size=10)
    k, chains = case.sample(linear_loss, size)
    s = closed.minibatch_covariance(case.x, case.y, case.w_star, case.n_beta, case.gamma, case.lr, 10)
    return _entries("T3 minibatches", k, chains, case.truth(s, size.draws, linear=True))


def _one_weight(lag1: float, copies: int) -> Regression:
    """One weight whose linear loss is an AR(1) trace with this autocorrelation from step to step."""
    one = np.ones((1, 1))
    return Regression(
        np.ones((2, 1)), np.zeros(2), one, np.zeros(1), np.zeros(1), 2 * (1 - lag1), thin=1, burnin=60, copies=copies
    )


def t4(size: Size) -> list[Row]:
    """AR(1) traces of lag-1 autocorrelation 0.9, 50 draws: what centring leaves of the variance."""
    case = _one_weight(0.9, 64)
    size = Size(size.chains, 50, size.seed, size.long)
    traces = lossk.sample_losses(**case.arguments(linear_loss, size))
    variance = float(BIASED(case.a, case.lr)[0, 0])
    factor = closed.ar1_centring_factor(0.9, 50)
    k = of_copies(lossk.LossKernel.from_traces(traces).to_numpy(), case.copies)[0] / variance
    out = rows(
        "T4 centring", ["chain-centred / true variance"], [factor], k, of_chains(traces.losses, 64)[:, 0] / variance
    )
    # Pooled: [C T sigma^2 - T Var(chain mean)] / (C T - 1); copies are independent, so they give the error.
    draws, total = 50, 50 * size.chains
    pooled = lossk.LossKernel.from_traces(traces, centering="pooled").variance.numpy()[:, None] / variance
    of_mean = 1 - factor * (draws - 1) / draws
    truth = (total - draws * of_mean) / (total - 1)
    return out + rows("T4 centring", ["pooled / true variance"], [truth], pooled.mean(0), pooled)


def t5(size: Size) -> list[Row]:
    """64 unrelated AR(1) traces of lag-1 0.5, kernels of 2 chains x 60: how often a correlation passes for real."""
    copies, lag1, draws = 64, 0.5, 60
    case = _one_weight(lag1, copies)
    size = Size(2 * size.chains, draws, size.seed, size.long)
    traces = lossk.sample_losses(**case.arguments(linear_loss, size))
    off = ~np.eye(copies, dtype=bool)
    bartlett = np.sqrt((1 + lag1**2) / ((1 - lag1**2) * 2 * draws))
    ar1 = lag1 ** np.abs(np.subtract.outer(np.arange(draws), np.arange(draws)))
    root = np.kron(np.eye(2), np.linalg.cholesky(ar1))  # of the covariance of a pooled trace [2 T]
    centre = np.kron(np.eye(2), np.eye(draws) - 1 / draws)
    shares, truths = [], []
    for start in range(0, size.chains, 2):
        part = lossk.LossTraces(traces.losses[start : start + 2])
        kernel = lossk.LossKernel.from_traces(part)
        r = kernel.to_numpy(correlation=True)
        floor = kernel.neighbors(1).noise_floor.double().numpy()
        shares.append([np.mean(np.abs(r[off]) > 1.96 * bartlett), np.mean((r > floor[:, None])[off])])
        u = centre @ part.losses.double().numpy().reshape(2 * draws, copies)
        u /= np.linalg.norm(u, axis=0)
        above = lambda level, u=u: np.mean(_null_tail(u, level, root, centre))  # noqa: E731
        truths.append([2 * above(np.full(copies, 1.96 * bartlett)), above(floor)])
    names = ["share of |R| above 1.96 se (nominal 0.05)", "share of R above neighbors().noise_floor (nominal 1/64)"]
    errors = np.array(shares) - np.array(truths)
    return rows("T5 noise floor", names, np.mean(truths, axis=0), np.mean(shares, axis=0), errors)


def _null_tail(u: Array, level: Array, root: Array, centre: Array) -> Array:
    """P(R_ij > level_i | trace i) [N] for an unrelated trace j = root z; u [m, N] the unit-norm centred traces i.

    R > level means z' root' (u u' - level^2 centre) root z > 0 and u'root z > 0; the first by Imhof's integral (1961).
    """
    left = root.T @ u
    forms = left.T[:, :, None] * left.T[:, None, :] - level[:, None, None] ** 2 * (root.T @ centre @ root)
    values = np.linalg.eigvalsh(forms)
    values /= values[:, -1:]
    t, step = np.linspace(-9, 7, 400, retstep=True)  # logarithm of the variable: dx / x = dt
    angle, size = np.zeros((len(values), t.size)), np.zeros((len(values), t.size))
    for value in values.T:
        x = value[:, None] * np.exp(t)
        angle += 0.5 * np.arctan(x)
        size += 0.25 * np.log1p(x**2)
    return 0.5 * (0.5 + step / np.pi * np.sum(np.sin(angle) * np.exp(-size), axis=1))


def t6(size: Size) -> list[Row]:
    """Two tasks on disjoint weights: no covariance between them; on shared weights: T1's."""
    half = Regression.make(0.8, d=6)
    mask = np.repeat([[1.0, 1, 1, 0, 0, 0], [0.0, 0, 0, 1, 1, 1]], 12, axis=0)
    out = []
    for name, shared in (("T6 two blocks", False), ("T6 shared trunk", True)):
        keep = np.ones_like(mask) if shared else mask
        case = Regression(**{**half.__dict__, "x": half.x * keep, "probe": half.probe * keep[9:15], "thin": 4})
        traces = lossk.sample_losses(**case.arguments(square_loss, size))
        k = of_copies(lossk.LossKernel.from_traces(traces).to_numpy(), case.copies)
        chains = of_chains(traces.losses, case.copies)
        truth = case.truth(BIASED(case.a, case.lr), size.draws, linear=False)
        sign = np.sign(truth[:3, 3:]) if shared else 1.0
        mean = lambda m, sign=sign: (m[..., :3, 3:] * sign).mean(axis=(-2, -1))[..., None]  # noqa: E731
        corr = lambda m: mean(m / np.sqrt(np.einsum("...i,...j->...ij", *2 * [np.einsum("...ii->...i", m)])))  # noqa: E731
        out += rows(
            name,
            ["mean K across tasks" + (", times its true sign" if shared else "")],
            mean(truth),
            mean(k),
            mean(chains),
        )
        if not shared:
            out += rows(name, ["mean R across tasks"], [0.0], corr(k), corr(chains))
    return out
