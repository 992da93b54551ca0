"""R-hat, effective sample sizes and standard errors against ArviZ, and against autoregressions whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from arviz_stats.base import array_stats as arviz

from lossk import convergence


def autoregression(shape: tuple[int, int, int], rho: float, seed: int) -> np.ndarray:
    """[C, T, w] of unit variance, each draw rho times the one before plus noise."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal(shape) * np.sqrt(1 - rho**2)
    traces = np.empty(shape)
    traces[:, 0] = rng.standard_normal((shape[0], shape[2]))
    for t in range(1, shape[1]):
        traces[:, t] = rho * traces[:, t - 1] + noise[:, t]
    return traces


@pytest.mark.filterwarnings("ignore::RuntimeWarning:arviz_stats")  # 0 / 0 where half chains are all ties
@pytest.mark.parametrize("num_chains", [1, 4])
@pytest.mark.parametrize("num_draws", [4, 5, 6, 7, 8, 9, 13, 64])
@pytest.mark.parametrize("rho", [-0.8, 0.5, 0.999])
def test_all_numbers_are_those_of_arviz(num_chains: int, num_draws: int, rho: float) -> None:
    traces = autoregression((num_chains, num_draws, 7), rho, seed=num_draws)
    traces[:, :, 1] = np.exp(3 * traces[:, :, 1])  # a heavy tail
    traces[:, :, 2] = np.round(traces[:, :, 2])  # ties
    traces[0, :, 3] += 3  # chains that disagree
    traces[0, :, 4] *= 10  # in their spread only
    axes = {"chain_axis": 0, "draw_axis": 1}
    for found, expected in (
        (convergence.rhat(traces), arviz.rhat(traces, **axes)),
        (convergence.bulk_ess(traces), arviz.ess(traces, **axes)),
        (convergence.mean_ess(traces), arviz.ess(traces, method="mean", **axes)),
        (convergence.mcse(traces), arviz.mcse(traces, method="mean", **axes)),
    ):
        usable = np.isfinite(expected)  # a tie in every half has no within-chain variance
        np.testing.assert_allclose(found[usable], expected[usable], rtol=1e-9)
        assert not np.isfinite(found[~usable]).any()


def test_an_autoregression_has_the_effective_draws_of_its_correlation_time() -> None:
    """(1 - rho) / (1 + rho) of the draws; 8 chains of 2,000 know it to about 5 %, the median of 40 better."""
    for rho in (0.0, 0.5, 0.9):
        traces = autoregression((8, 2000, 40), rho, seed=1)
        expected = 16_000 * (1 - rho) / (1 + rho)
        assert abs(np.median(convergence.mean_ess(traces)) / expected - 1) < 0.08
        assert np.median(convergence.rhat(traces)) < 1.02


def test_a_trace_that_is_constant_between_its_halves_is_no_number() -> None:
    traces = np.zeros((2, 5, 1))
    traces[:, 2] = 1.0  # the draw that splitting drops
    assert np.isnan(convergence.rhat(traces)).all()
    assert convergence.bulk_ess(traces) == 8
