"""The closed forms of oracles.py against exact computations that share nothing with them."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

import oracles


def gauss_hermite_covariance(gradients: np.ndarray, hessians: np.ndarray, s: np.ndarray) -> np.ndarray:
    """Cov of the quadratic losses for d = 2 by quadrature, exact for polynomials of degree <= 15."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(8)
    u = np.stack(np.meshgrid(nodes, nodes), -1).reshape(-1, 2) @ np.linalg.cholesky(s).T
    p = np.outer(weights, weights).reshape(-1) / (2 * np.pi)
    losses = u @ gradients.T + 0.5 * np.einsum("pa,iab,pb->pi", u, hessians, u)
    centered = losses - p @ losses
    return centered.T @ (p[:, None] * centered)


def test_quadratic_covariance_is_exact() -> None:
    rng = np.random.default_rng(1)
    g, h = rng.standard_normal((5, 2)), rng.standard_normal((5, 2, 2))
    h = h + np.swapaxes(h, 1, 2)
    s = np.array([[0.7, 0.3], [0.3, 0.4]])
    np.testing.assert_allclose(
        oracles.quadratic_covariance(g, h, s), gauss_hermite_covariance(g, h, s), rtol=1e-12, atol=1e-13
    )


def test_regression_is_the_quadratic_form() -> None:
    rng = np.random.default_rng(2)
    x, r = rng.standard_normal((6, 3)), rng.standard_normal(6)
    cross = rng.standard_normal((3, 3))  # also at a lag, where it need not be symmetric
    full = oracles.quadratic_covariance(-r[:, None] * x, x[:, :, None] * x[:, None, :], cross)
    np.testing.assert_allclose(oracles.regression_covariance(x, r, cross), full, rtol=1e-12)


def test_posterior_mean_is_stationary() -> None:
    rng = np.random.default_rng(3)
    x, y, w_star = rng.standard_normal((9, 3)), rng.standard_normal(9), rng.standard_normal(3)
    mu = oracles.posterior_mean(x, y, w_star, 40.0, 3.0)
    drift = 40.0 * x.T @ (x @ mu - y) / 9 + 3.0 * (mu - w_star)
    np.testing.assert_allclose(drift, 0, atol=1e-12)


def test_discretised_covariance_is_the_fixed_point() -> None:
    a = np.array([[5.0, 1.0], [1.0, 2.0]])
    lr = 0.3
    b = np.eye(2) - lr / 2 * a
    s = oracles.discretised_covariance(a, lr)
    np.testing.assert_allclose(b @ s @ b.T + lr * np.eye(2), s, rtol=1e-12)
    np.testing.assert_allclose(oracles.lag_covariance(a, lr, 3), s @ b @ b @ b, rtol=1e-12)
    # the excess of a mode over 1/a is eps a / 4 to first order
    excess = oracles.discretised_covariance(np.array([[5.0]]), 1e-4)[0, 0] * 5 - 1
    assert excess == pytest.approx(1e-4 * 5 / 4, rel=1e-3)


def test_minibatch_covariance_by_enumeration() -> None:
    """Every minibatch of m = 2 out of n = 5, the second moment iterated to its fixed point."""
    rng = np.random.default_rng(4)
    x, y = rng.standard_normal((5, 2)), rng.standard_normal(5)
    w_star = np.linalg.lstsq(x, y, rcond=None)[0]
    n_beta, gamma, lr = 20.0, 4.0, 0.02
    s = np.zeros((2, 2))
    batches = [list(c) for c in combinations(range(5), 2)]
    for _ in range(4000):
        moment = np.zeros((2, 2))
        for rows in batches:
            xb, yb = x[rows], y[rows]
            b = np.eye(2) - lr / 2 * (n_beta * xb.T @ xb / 2 + gamma * np.eye(2))
            kick = -lr / 2 * n_beta * xb.T @ (xb @ w_star - yb) / 2
            moment += b @ s @ b.T + np.outer(kick, kick)
        s = moment / len(batches) + lr * np.eye(2)
    np.testing.assert_allclose(
        oracles.minibatch_covariance(x, y, w_star, n_beta, gamma, lr, 2), s, rtol=1e-10, atol=1e-12
    )


def test_full_batch_is_a_minibatch_of_everything() -> None:
    rng = np.random.default_rng(5)
    x, y = rng.standard_normal((6, 2)), rng.standard_normal(6)
    w_star = np.linalg.lstsq(x, y, rcond=None)[0]
    np.testing.assert_allclose(
        oracles.minibatch_covariance(x, y, w_star, 20.0, 4.0, 0.02, 6),
        oracles.discretised_covariance(oracles.posterior_precision(x, 20.0, 4.0), 0.02),
        rtol=1e-10,
    )


@pytest.mark.parametrize(("rho", "t"), [(0.9, 50), (0.0, 7), (0.99, 20), (-0.5, 3)])
def test_centering_factor(rho: float, t: int) -> None:
    lag = np.abs(np.subtract.outer(np.arange(t), np.arange(t)))
    sigma = np.where(lag == 0, 1.0, rho**lag)  # the covariance matrix of the trace
    center = np.eye(t) - 1 / t
    exact = np.trace(center @ sigma) / (t - 1)
    assert oracles.ar1_centering_factor(rho, t) == pytest.approx(exact, rel=1e-12)
    assert oracles.centered_expectation(sigma[0]) == pytest.approx(exact, rel=1e-12)


def test_centering_factor_of_the_mathematics_page() -> None:
    assert oracles.ar1_centering_factor(0.9, 50) == pytest.approx(0.706, abs=5e-4)


def test_two_pass_is_numpys_covariance() -> None:
    losses = np.random.default_rng(6).standard_normal((3, 7, 4)).astype(np.float32)
    within = np.mean([np.cov(chain.astype(np.float64).T) for chain in losses], axis=0)
    np.testing.assert_allclose(oracles.two_pass(losses), within, rtol=1e-12)
    pooled = np.cov(losses.astype(np.float64).reshape(21, 4).T)
    np.testing.assert_allclose(oracles.two_pass(losses, "pooled"), pooled, rtol=1e-12)


def test_correlation_of_zero_variance() -> None:
    r = oracles.correlation(np.array([[4.0, 0.0, 2.0], [0.0, 0.0, 0.0], [2.0, 0.0, 1e-300]]))
    np.testing.assert_array_equal(r[1], [0, 1, 0])
    assert np.isfinite(r).all()


@pytest.mark.parametrize("margin", [-99.5, -3.25, 0.0, 1e-3, 1.0, 17.0, 40.0, 69.1, 87.0])
@pytest.mark.parametrize("others", [[0.25], [0.5, -1.0], [0.0, -2.5, 0.125, -0.75]])
def test_cross_entropy_against_decimals(margin: float, others: list[float]) -> None:
    logits = [*others, margin]
    exact = oracles.cross_entropy_decimal(logits, len(others))
    got = oracles.cross_entropy(np.array([logits]), np.array([len(others)]))
    assert got[0] == pytest.approx(exact, rel=1e-13)


def test_z_test_has_power_and_size() -> None:
    """Gaussian estimates: the truth passes, a target 30 % off does not."""
    rng = np.random.default_rng(7)
    w = rng.standard_normal((32, 200, 5))
    estimates = np.einsum("cti,ctj->cij", w, w) / 200
    assert oracles.consistent(oracles.z_scores(estimates, np.eye(5)))
    assert not oracles.consistent(oracles.z_scores(estimates, 1.3 * np.eye(5)))
    assert not oracles.consistent(np.array([0.0, np.nan]))
