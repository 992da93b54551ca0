"""Closed forms that a correct implementation must reproduce: plain float64 numpy, no lossk, no torch.

The names T1..T4 are those of the project's mathematics page; `test_oracles.py` checks every function here against an
independent, exact computation, so that a failing comparison elsewhere points at the implementation.
"""

from __future__ import annotations

from decimal import Decimal, localcontext

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

UNIT32 = 2.0**-24  # unit roundoff of float32: the largest relative error of one correctly rounded operation
UNIT16 = 2.0**-11  # of float16
TINY32 = 2.0**-149  # the smallest positive float32: what underflow can cost in absolute terms


def quadratic_covariance(gradients: Array, hessians: Array, cross: Array) -> Array:
    """T1, also at a lag: Cov[l_i(w), l_j(w')] for l_i = c_i + g_i'(w-mu) + 1/2 (w-mu)' H_i (w-mu).

    gradients [N, d] at the mean mu, hessians [N, d, d], cross [d, d] = E[(w-mu)(w'-mu)'] of the jointly Gaussian
    (w, w'); for w' = w that is the covariance of w. Returns [N, N].
    """
    linear = gradients @ cross @ gradients.T
    left = np.einsum("iab,bc->iac", hessians, cross)  # H_i M
    right = np.einsum("iab,cb->iac", hessians, cross)  # H_j M'
    return linear + 0.5 * np.einsum("iab,jba->ij", left, right)


def regression_covariance(x: Array, residual: Array, cross: Array) -> Array:
    """T1 for l = 1/2 (x'w - y)^2: r_i r_j s_ij + 1/2 s_ij^2, s = x S x'. x [N, d], residual [N] = y - x'mu."""
    s = x @ cross @ x.T
    return np.outer(residual, residual) * s + 0.5 * s**2


def posterior_precision(x: Array, n_beta: float, localization: float) -> Array:
    """A = nbeta H + gamma I for L_n = mean 1/2 (x'w - y)^2 over the n rows of x."""
    return n_beta / len(x) * x.T @ x + localization * np.eye(x.shape[1])


def posterior_mean(x: Array, y: Array, w_star: Array, n_beta: float, localization: float) -> Array:
    """The minimum of nbeta L_n(w) + gamma/2 |w - w*|^2 for the same loss."""
    a = posterior_precision(x, n_beta, localization)
    return np.linalg.solve(a, n_beta / len(x) * x.T @ y + localization * w_star)


def discretised_covariance(a: Array, lr: float) -> Array:
    """T2: stationary covariance A^-1 (I - eps A/4)^-1 of SGLD with the full gradient and step eps."""
    assert lr * np.linalg.eigvalsh(a)[-1] < 4, "the chain is unstable"
    eye = np.eye(len(a))
    return np.linalg.solve(a, np.linalg.inv(eye - lr / 4 * a))


def lag_covariance(a: Array, lr: float, steps: int) -> Array:
    """E[(w_t - mu)(w_{t+steps} - mu)'] in the stationary state: S_eps (I - eps A/2)^steps."""
    return discretised_covariance(a, lr) @ np.linalg.matrix_power(np.eye(len(a)) - lr / 2 * a, steps)


def minibatch_covariance(x: Array, y: Array, mu: Array, n_beta: float, gamma: float, lr: float, m: float) -> Array:
    """T3: stationary covariance with minibatches of m out of n rows without replacement, around the posterior mean mu.

    S = B S B' + (eps nbeta/2)^2 f E[(H_i-H) S (H_i-H)] + eps I + (eps^2/4) nbeta^2 f Cov(g),  f = (n-m)/(m(n-1)),
    g at mu, which is w* itself where w* is the least-squares fit.
    """
    n, d = x.shape
    hessians = x[:, :, None] * x[:, None, :]
    h = hessians.mean(0)
    gradients = (x @ mu - y)[:, None] * x
    f = (n - m) / (m * (n - 1))
    b = np.eye(d) - lr / 2 * (n_beta * h + gamma * np.eye(d))
    noise = lr * np.eye(d) + lr**2 / 4 * n_beta**2 * f * np.cov(gradients.T, bias=True).reshape(d, d)
    deviations = hessians - h
    multiplicative = sum(np.kron(e, e) for e in deviations) / n
    system = np.eye(d * d) - np.kron(b, b) - (lr * n_beta / 2) ** 2 * f * multiplicative
    return np.linalg.solve(system, noise.reshape(-1)).reshape(d, d)


def centered_expectation(lags: Array) -> Array:
    """Expectation of the chain-centered covariance of T draws. lags [T, ...]: C(k) = Cov(draw t, draw t+k), k = 0..T-1.

    T/(T-1) (C(0) - V), V the covariance of the mean of T draws; the general form of T4.
    """
    t = len(lags)
    weight = 1 - np.arange(1, t) / t
    both = lags[1:] + (np.swapaxes(lags[1:], -1, -2) if lags.ndim == 3 else lags[1:])
    of_mean = (lags[0] + np.tensordot(weight, both, axes=1)) / t
    return t / (t - 1) * (lags[0] - of_mean)


def ar1_centering_factor(rho: float, t: int) -> float:
    """T4: E[chain-centered variance] / sigma^2 of T draws of a stationary AR(1) trace."""
    k = np.arange(1, t)
    v = (1 + 2 * np.sum((1 - k / t) * rho**k)) / t
    return float(t / (t - 1) * (1 - v))


def ar1_traces(rng: np.random.Generator, shape: tuple[int, int, int], rho: float) -> Array:
    """Independent stationary AR(1) traces of unit variance, [chain, draw, sample]."""
    noise = rng.standard_normal(shape)
    traces = np.empty(shape)
    traces[:, 0] = noise[:, 0]
    for t in range(1, shape[1]):
        traces[:, t] = rho * traces[:, t - 1] + np.sqrt(1 - rho**2) * noise[:, t]
    return traces


def two_pass(losses: NDArray[np.float32], centering: str = "chain") -> Array:
    """The estimator of the mathematics page in two float64 passes. losses [chain, draw, sample] -> K [N, N]."""
    x = losses.astype(np.float64)
    chains, draws, _ = x.shape
    mean = x.mean(axis=1, keepdims=True) if centering == "chain" else x.mean(axis=(0, 1), keepdims=True)
    c = (x - mean).reshape(chains * draws, -1)
    return c.T @ c / (chains * (draws - 1) if centering == "chain" else chains * draws - 1)


def correlation(k: Array) -> Array:
    """R with the zero-variance convention: 0 off the diagonal, 1 on it."""
    sd = np.sqrt(np.diag(k))
    live = sd > 0
    safe = np.where(live, sd, 1.0)
    r = np.where(np.outer(live, live), k / safe[:, None] / safe[None, :], 0.0)
    np.fill_diagonal(r, 1.0)
    return r


def cross_entropy(logits: NDArray[np.floating], targets: NDArray[np.int64]) -> Array:
    """log sum_c exp(x_c - x_t) as log1p of the sum over c != t, in float64 from the logits as given. [B, C] -> [B]."""
    x = logits.astype(np.float64)
    rows = np.arange(len(x))
    with np.errstate(under="ignore"):
        others = np.exp(x - x[rows, targets][:, None])
    others[rows, targets] = 0
    return np.log1p(others.sum(axis=1))


def cross_entropy_decimal(logits: list[float], target: int, digits: int = 60) -> float:
    """The same for one sample in decimal arithmetic, to judge `cross_entropy` itself."""
    with localcontext() as context:
        context.prec = digits
        total = sum((Decimal(v) - Decimal(logits[target])).exp() for v in logits)
        return float(total.ln())


def z_scores(estimates: Array, target: Array, mean: Array | None = None) -> Array:
    """z of every entry i <= j of the mean of independent estimates [C, N, N], its standard error from their spread.

    `mean` [N, N] replaces their mean where the code under test has averaged them itself.
    """
    upper = np.triu_indices(target.shape[0])
    mean = (estimates.mean(axis=0) if mean is None else mean)[upper]
    error = estimates.std(axis=0, ddof=1)[upper] / np.sqrt(len(estimates))
    return (mean - target[upper]) / error


def consistent(z: Array, max_z: float = 4.5, max_rms: float = 1.6) -> bool:
    """Whether z scores look like standard normals. Few are independent here, so the rms has a wide band."""
    return bool(np.all(np.abs(z) < max_z) and np.sqrt(np.mean(z**2)) < max_rms)
