"""Significant neighbors: against dense sorting, on planted blocks, and where there is nothing to find."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import lossk
import oracles
from lossk.analysis import significant_neighbors
from planted import planted_kernel, planted_traces

LABELS = torch.arange(90) % 5


def expected(kernel: lossk.LossKernel, k: int, anti: bool) -> np.ndarray:
    """[N, k] indices by sorting the whole matrix; ties go to the smaller index."""
    r = kernel.to_numpy(correlation=True).astype(np.float64)
    order = r if anti else -r
    np.fill_diagonal(order, np.inf)
    order[:, kernel.dead.numpy()] = np.inf
    return np.argsort(order, axis=1, kind="stable")[:, :k]


@pytest.mark.parametrize("anti", [False, True])
def test_same_as_sorting_the_matrix(anti: bool) -> None:
    kernel = planted_kernel(LABELS, dead=2)
    found = significant_neighbors(kernel, 7, anti=anti)
    alive = ~kernel.dead
    np.testing.assert_array_equal(found.index[alive].numpy(), expected(kernel, 7, anti)[alive.numpy()])
    assert (found.index[kernel.dead] == -1).all()
    assert not found.significant[kernel.dead].any()
    assert found.standard_error[kernel.dead].isnan().all()
    assert found.by_chance[kernel.dead].isnan().all()
    rows = torch.arange(90)[alive]
    block = kernel.correlation(rows, slice(None)).gather(1, found.index[alive])
    torch.testing.assert_close(found.correlation[alive], block, rtol=0, atol=1e-6)


@pytest.mark.parametrize("anti", [False, True])
@pytest.mark.parametrize("tile", [16, 32, 128])
def test_tiles_and_rows_agree_with_the_factor(anti: bool, tile: int, problem, build) -> None:
    tiled = build(problem.model(), problem.data, tile=tile, num_draws=8)
    whole = tiled.neighbors(4, anti=anti)
    np.testing.assert_array_equal(whole.index.numpy(), expected(tiled, 4, anti))
    some = tiled.neighbors(4, rows=[20, 3], anti=anti)
    torch.testing.assert_close(some.index, whole.index[[20, 3]])
    torch.testing.assert_close(some.correlation, whole.correlation[[20, 3]])


def test_standard_errors_are_those_of_the_kernel() -> None:
    kernel = planted_kernel(LABELS)
    rows = [0, 17, 89]
    found = significant_neighbors(kernel, 6, rows)
    block = kernel.standard_error(rows, slice(None), correlation=True).gather(1, found.index)
    torch.testing.assert_close(found.standard_error, block, rtol=1e-5, atol=1e-8)


def test_planted_blocks_are_found_and_nothing_else() -> None:
    kernel = planted_kernel(LABELS)  # blocks of 18
    found = significant_neighbors(kernel, 17)
    assert (LABELS[found.index] == LABELS.unsqueeze(1)).all()
    assert found.significant.all()
    assert found.share == 1.0
    assert found.by_chance.max() < 1e-10
    beyond = significant_neighbors(kernel, 40)  # the other 23 of each row are unrelated
    strange = LABELS[beyond.index] != LABELS.unsqueeze(1)
    assert beyond.significant[strange].double().mean() < 3 / 23


@pytest.mark.parametrize("anti", [False, True])
def test_unrelated_samples_are_called_so(anti: bool) -> None:
    traces = lossk.LossTraces(torch.randn(4, 250, 600, generator=torch.Generator().manual_seed(5)))
    kernel = lossk.LossKernel.from_traces(traces)
    found = significant_neighbors(kernel, 20, anti=anti)
    above = found.significant.sum(dim=1).double()
    # One per row is expected above the floor; rows share pairs, hence the wide band.
    assert 0.8 < float(above.mean()) < 1.2
    assert 0.8 < float((found.by_chance < 1).sum(dim=1).double().mean()) < 1.2
    assert float((found.by_chance[:, 0] < 0.05).double().mean()) == pytest.approx(0.05, abs=0.03)
    assert found.share == pytest.approx(float(above.mean()) / 20)


def test_planted_traces_are_what_they_say() -> None:
    kernel = lossk.LossKernel.from_traces(planted_traces(LABELS, num_draws=2000))
    r = kernel.to_numpy(correlation=True)
    same = (LABELS.unsqueeze(0) == LABELS.unsqueeze(1)).numpy() & ~np.eye(90, dtype=bool)
    assert r[same].mean() == pytest.approx(0.7, abs=0.02)
    assert abs(r[LABELS.unsqueeze(0).numpy() != LABELS.unsqueeze(1).numpy()].mean()) < 0.02


def test_k_is_checked() -> None:
    with pytest.raises(ValueError, match="k must be an integer from 1 to N - 1 = 89, got 90"):
        significant_neighbors(planted_kernel(LABELS), 90)


def test_noise_floor() -> None:
    """Independent samples: about one row in e has a best neighbor below its floor, whatever the autocorrelation.

    The floor is what the best of N unrelated samples reaches; over 300 rows its share has an error of 3 %. A shared
    signal in 40 of them stands far above.
    """
    rng = np.random.default_rng(6)
    for rho in (0.0, 0.6):
        traces = oracles.ar1_traces(rng, (4, 250, 300), rho)
        kernel = lossk.LossKernel.from_traces(lossk.LossTraces(traces.astype(np.float32)))
        best, floor = (np.asarray(v, dtype=np.float64) for v in kernel.neighbors(1)[1:])
        assert np.all((floor > 0) & (floor < 1))
        assert 0.2 < np.mean(best[:, 0] < floor) < 0.8
    traces[:, :, :40] += 2 * oracles.ar1_traces(rng, (4, 250, 1), rho)
    kernel = lossk.LossKernel.from_traces(lossk.LossTraces(traces.astype(np.float32)))
    best, floor = (np.asarray(v, dtype=np.float64) for v in kernel.neighbors(1)[1:])
    assert np.all(best[:40, 0] > 2 * floor[:40])
