"""T1 to T6: linear regression by full batch, long steps, a frozen preconditioner and minibatches; centering; noise."""

from __future__ import annotations

import dataclasses

import numpy as np

import lossk
from bench.oracle_problems import (
    Array,
    Regression,
    Row,
    Size,
    closed,
    linear_loss,
    of_chains,
    of_copies,
    rows,
    square_loss,
)
from lossk.ops.philox import normals

BIASED = closed.discretised_covariance  # what the tests replace by the unbiased one, to see the table fail


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
    """A step at which the stiffest variance is 2.5 times too large; then the excess of tr S over eps at two steps."""
    case = Regression.make(2.4)
    k, chains = case.sample(square_loss, size)
    out = _entries("T2 long step", k, chains, case.truth(BIASED(case.a, case.lr), size.draws, linear=False))
    for number, stiffness in enumerate((0.5, 1.0)):
        case = Regression.make(stiffness, thin=3, burnin=100, copies=64)
        eye = np.eye(3)
        case = dataclasses.replace(case, probe=eye, answer=np.zeros(3))
        k, chains = case.sample(linear_loss, size.part(number))
        # What the unbiased covariance S would give, centering included, is taken off truth and estimate alike.
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
    case = dataclasses.replace(case, probe=np.eye(3), answer=np.zeros(3))
    longer = dataclasses.replace(size, draws=size.draws + skip)
    whole = lossk.sample_losses(**case.arguments(linear_loss, longer, "rmsprop-frozen"))
    traces = lossk.LossTraces(whole.losses[:, skip:])
    k = of_copies(lossk.LossKernel.from_traces(traces).to_numpy(), case.copies)
    chains = of_chains(traces.losses, case.copies)
    truth = np.stack([_frozen_truth(case, size, chain) for chain in range(size.chains)])
    pick = lambda m: np.stack([np.trace(m, axis1=-2, axis2=-1), m[..., 0, 0], m[..., 0, 1]], axis=-1)  # noqa: E731
    names = ["tr S", "S[0, 0]", "S[0, 1]"]
    return rows("T2 RMSprop frozen", names, pick(truth).mean(0), pick(k), pick(chains) - pick(truth))


def _frozen_truth(case: Regression, size: Size, chain: int) -> Array:
    """E of the chain-centered S [d, d] given the preconditioner that this chain froze, mean over copies."""
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
    return closed.centered_expectation(np.stack(lags).mean(axis=1))


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
    """AR(1) traces of lag-1 autocorrelation 0.9, 50 draws: what centering leaves of the variance."""
    case = _one_weight(0.9, 64)
    size = dataclasses.replace(size, draws=50)
    traces = lossk.sample_losses(**case.arguments(linear_loss, size))
    variance = float(BIASED(case.a, case.lr)[0, 0])
    factor = closed.ar1_centering_factor(0.9, 50)
    k = of_copies(lossk.LossKernel.from_traces(traces).to_numpy(), case.copies)[0] / variance
    out = rows(
        "T4 centering", ["chain-centered / true variance"], [factor], k, of_chains(traces.losses, 64)[:, 0] / variance
    )
    # Pooled: [C T sigma^2 - T Var(chain mean)] / (C T - 1); copies are independent, so they give the error.
    draws, total = 50, 50 * size.chains
    pooled = lossk.LossKernel.from_traces(traces, centering="pooled").variance.numpy()[:, None] / variance
    of_mean = 1 - factor * (draws - 1) / draws
    truth = (total - draws * of_mean) / (total - 1)
    return out + rows("T4 centering", ["pooled / true variance"], [truth], pooled.mean(0), pooled)


def t5(size: Size) -> list[Row]:
    """64 unrelated AR(1) traces of lag-1 0.5, kernels of 2 chains x 60: how often a correlation passes for real."""
    copies, lag1, draws = 64, 0.5, 60
    case = _one_weight(lag1, copies)
    size = dataclasses.replace(size, chains=2 * size.chains, draws=draws)
    traces = lossk.sample_losses(**case.arguments(linear_loss, size))
    off = ~np.eye(copies, dtype=bool)
    bartlett = np.sqrt((1 + lag1**2) / ((1 - lag1**2) * 2 * draws))
    ar1 = lag1 ** np.abs(np.subtract.outer(np.arange(draws), np.arange(draws)))
    root = np.kron(np.eye(2), np.linalg.cholesky(ar1))  # of the covariance of a pooled trace [2 T]
    center = np.kron(np.eye(2), np.eye(draws) - 1 / draws)
    shares, truths = [], []
    for start in range(0, size.chains, 2):
        part = lossk.LossTraces(traces.losses[start : start + 2])
        kernel = lossk.LossKernel.from_traces(part)
        r = kernel.to_numpy(correlation=True)
        floor = kernel.neighbors(1).noise_floor.double().numpy()
        shares.append([np.mean(np.abs(r[off]) > 1.96 * bartlett), np.mean((r > floor[:, None])[off])])
        u = center @ part.losses.double().numpy().reshape(2 * draws, copies)
        u /= np.linalg.norm(u, axis=0)
        above = lambda level, u=u: np.mean(_null_tail(u, level, root, center))  # noqa: E731
        truths.append([2 * above(np.full(copies, 1.96 * bartlett)), above(floor)])
    names = ["share of |R| above 1.96 se (nominal 0.05)", "share of R above neighbors().noise_floor (nominal 1/64)"]
    errors = np.array(shares) - np.array(truths)
    return rows("T5 noise floor", names, np.mean(truths, axis=0), np.mean(shares, axis=0), errors)


def _null_tail(u: Array, level: Array, root: Array, center: Array) -> Array:
    """P(R_ij > level_i | trace i) [N] for an unrelated trace j = root z; u [m, N] the unit-norm centered traces i.

    R > level means z' root' (u u' - level^2 center) root z > 0 and u'root z > 0; the first by Imhof's integral (1961).
    """
    left = root.T @ u
    forms = left.T[:, :, None] * left.T[:, None, :] - level[:, None, None] ** 2 * (root.T @ center @ root)
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
    for number, (name, shared) in enumerate((("T6 two blocks", False), ("T6 shared trunk", True))):
        keep = np.ones_like(mask) if shared else mask
        case = dataclasses.replace(half, x=half.x * keep, probe=half.probe * keep[9:15], thin=4)
        traces = lossk.sample_losses(**case.arguments(square_loss, size.part(number)))
        kernel = lossk.LossKernel.from_traces(traces)
        k, chains = of_copies(kernel.to_numpy(), case.copies), of_chains(traces.losses, case.copies)
        truth = case.truth(BIASED(case.a, case.lr), size.draws, linear=False)
        sign = np.sign(truth[:3, 3:]) if shared else 1.0
        mean = lambda m, sign=sign: (m[..., :3, 3:] * sign).mean(axis=(-2, -1))[..., None]  # noqa: E731
        quantity = "mean K across tasks" + (", times its true sign" if shared else "")
        out += rows(name, [quantity], mean(truth), mean(k), mean(chains))
        if not shared:
            r = of_copies(kernel.to_numpy(correlation=True), case.copies)
            sd = np.sqrt(np.diag(k))
            out += rows(name, ["mean R across tasks"], [0.0], mean(r), mean(chains / np.outer(sd, sd)))
    return out + _coupled_by_minibatches(half, mask, size.part(2))


def _coupled_by_minibatches(half: Regression, mask: Array, size: Size) -> list[Row]:
    """Disjoint weights, but a minibatch rich in one task is poor in the other: T3 around the posterior mean."""
    far = {"w_star": half.w_star + np.float64(4.0), "gamma": 30.0}  # mean gradients that do not vanish
    case = dataclasses.replace(half, x=half.x * mask, probe=half.probe * mask[9:15], thin=4, batch_size=4, **far)
    k, chains = case.sample(linear_loss, size)
    mu = closed.posterior_mean(case.x, case.y, case.w_star, case.n_beta, case.gamma)
    s = closed.minibatch_covariance(case.x, case.y, mu, case.n_beta, case.gamma, case.lr, 4)
    truth = case.truth(s, size.draws, linear=True)
    sign = np.sign(truth[:3, 3:])
    mean = lambda m: (m[..., :3, 3:] * sign).mean(axis=(-2, -1))[..., None]  # noqa: E731
    return rows(
        "T6 minibatch coupling", ["mean K across tasks, times its true sign"], mean(truth), mean(k), mean(chains)
    )
