"""Standard errors of kernel entries against the spread of repeated estimates."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import lossk


def correlated_ar1(repeats: int, chains: int, draws: int, r: float, rho: float) -> Tensor:
    """[repeats, C, T, 2] float64: AR(1) traces of lag-1 autocorrelation r, correlation rho, variances 1, 4."""
    noise = torch.randn(draws, repeats, chains, 2, dtype=torch.float64)
    noise[..., 1] = rho * noise[..., 0] + math.sqrt(1 - rho**2) * noise[..., 1]
    x = torch.zeros_like(noise)
    x[0] = noise[0]
    for t in range(1, draws):
        x[t] = r * x[t - 1] + math.sqrt(1 - r**2) * noise[t]
    return x.permute(1, 2, 0, 3) * torch.tensor([1.0, 2.0], dtype=torch.float64)


@pytest.mark.parametrize(("r", "rho"), [(0.0, 0.0), (0.0, 0.7), (0.6, 0.0), (0.6, 0.5)])
def test_standard_errors_match_the_spread_over_repeats(r: float, rho: float) -> None:
    """Over 250 repeats of 8 chains x 200 draws: the root mean square error bar within 15 % of the actual spread.

    250 repeats know the spread to 4.5 %; centering by chain and an estimated r cost a few per cent more at r = 0.6.
    """
    traces = correlated_ar1(250, 8, 200, r, rho)
    found: dict[str, list[float]] = {"K": [], "R": []}
    claimed: dict[tuple[str, str], list[float]] = {}
    for repeat in traces:
        kernel = lossk.LossKernel.from_traces(lossk.LossTraces(repeat))
        found["K"].append(float(kernel[0, 1]))
        found["R"].append(float(kernel.correlation(0, 1)))
        for method in ("lag1", "products", "chains"):
            for name in ("K", "R"):
                error = kernel.standard_error(0, 1, correlation=name == "R", method=method)
                claimed.setdefault((name, method), []).append(float(error))
    for (name, method), errors in claimed.items():
        spread = float(torch.tensor(found[name]).std())
        size = float(torch.tensor(errors).square().mean().sqrt())
        assert 0.85 * spread < size < 1.15 * spread, (name, method)


def test_tiles_and_factor_agree_and_the_diagonal_of_r_has_no_error() -> None:
    from streamed_kernels import kernel_from_panels

    losses = correlated_ar1(1, 3, 40, 0.5, 0.3)[0].float()
    factor = lossk.LossKernel.from_traces(lossk.LossTraces(losses))
    tiles = kernel_from_panels(((c, losses[c]) for c in range(3)), 2, num_chains=3, num_draws=40, tile=16)
    for correlation in (False, True):
        a, b = (kernel.standard_error(correlation=correlation, method="lag1") for kernel in (factor, tiles))
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0.0)
        assert torch.equal(a, a.T)
        assert a.shape == (2, 2)
    for method in ("lag1", "products"):
        assert factor.standard_error(correlation=True, method=method).diagonal().abs().max() < 1e-6
    assert torch.equal(factor.standard_error(), factor.standard_error(method="interval"))
    assert torch.equal(tiles.standard_error(), tiles.standard_error(method="watched"))
    torch.testing.assert_close(tiles.standard_error(), factor.standard_error(), rtol=1e-5, atol=0.0)  # all are watched
    for method in ("chains", "products"):
        with pytest.raises(ValueError, match=r"from_traces.*tiles"):
            tiles.standard_error(method=method)
    with pytest.raises(ValueError, match=r"method.*abacus"):
        factor.standard_error(method="abacus")


def test_losses_that_are_squares_of_one_direction() -> None:
    """x_i = u^2 + v^2 of the same u, v: var(x_i x_j) is 128, of normal losses it would be 32; "products" sees it.

    400 repeats know the spread to about 6 % with tails like these: within 15 %, where "lag1" is half the truth.
    """
    found, claimed, normal = [], [], []
    for _ in range(400):
        losses = torch.randn(2, 600, 1, 2).square().sum(dim=-1) * (1 + 0.01 * torch.randn(2, 600, 2))
        kernel = lossk.LossKernel.from_traces(lossk.LossTraces(losses))
        found.append(float(kernel[0, 1]))
        claimed.append(float(kernel.standard_error(0, 1, method="products")))
        normal.append(float(kernel.standard_error(0, 1, method="lag1")))
    spread = float(torch.tensor(found).std())
    assert 0.85 * spread < float(torch.tensor(claimed).square().mean().sqrt()) < 1.15 * spread
    assert float(torch.tensor(normal).mean()) < 0.67 * spread


def spread_by_hand(terms: np.ndarray) -> float:
    """Variance of the mean of [C, T] terms: batches of 1, 2, 4, ..., T draws while it grows, and 3/4 of its growth."""
    terms = terms - terms.mean()
    chains, draws = terms.shape
    lengths = [2**k for k in range(20) if k == 0 or draws // 2**k >= 2] + [draws] * (chains >= 3)
    found = []
    for b in lengths:
        sums = [chain[k * b : (k + 1) * b].sum() for chain in terms for k in range(draws // b)]
        found.append(np.square(sums).sum() / b / (len(sums) - 1))
    last = 0
    while last + 1 < len(found) and found[last + 1] > found[last]:
        last += 1
    growth = found[last] - found[last - 1] if 0 < last < len(found) - 1 else 0.0
    return (found[last] + 0.75 * growth) / terms.size


@pytest.mark.parametrize("draws", [3, 17, 64])
def test_batches_against_the_same_written_out(draws: int) -> None:
    from lossk.diagnostics.batch_means import spread_of_mean

    series = np.random.default_rng(draws).standard_normal((3, draws, 7)).cumsum(axis=1)
    found = spread_of_mean(torch.from_numpy(series.copy())).variance.numpy()
    np.testing.assert_allclose(found, [spread_by_hand(series[..., i]) for i in range(7)], rtol=1e-10)


@pytest.mark.parametrize("correlation", [False, True])
def test_products_term_by_term(correlation: bool) -> None:
    """Of independent draws, where bias and skewness are small, against the terms' spread in NumPy for every pair."""
    losses = np.random.default_rng(0).random((4, 500, 5)) ** 3
    kernel = lossk.LossKernel.from_traces(lossk.LossTraces(losses))
    x = losses - losses.mean(axis=1, keepdims=True)
    freedom = 4 * 499
    if correlation:
        x = x / np.sqrt((x**2).sum(axis=(0, 1)) / freedom)
    truth = np.empty((5, 5))
    for i in range(5):
        for j in range(5):
            p = x[..., i] * x[..., j]
            p = p - (p.sum() / freedom) * ((x[..., i] ** 2 + x[..., j] ** 2) / 2 if correlation else 1.0)
            truth[i, j] = np.sqrt(spread_by_hand(p))
    error = kernel.standard_error(correlation=correlation, method="products").numpy()
    off = ~np.eye(5, dtype=bool)
    np.testing.assert_allclose(error[off], truth[off], rtol=0.01)
    assert (error.diagonal() == 0).all() if correlation else (error.diagonal() > truth.diagonal()).all()


def test_dead_samples_have_no_error() -> None:
    losses = torch.randn(2, 10, 3)
    losses[..., 1] = 0.25
    kernel = lossk.LossKernel.from_traces(lossk.LossTraces(losses))
    for method in ("lag1", "chains", "products"):
        assert torch.all(kernel.standard_error(method=method)[1] == 0)
        assert torch.isfinite(kernel.standard_error(correlation=True, method=method)).all()
