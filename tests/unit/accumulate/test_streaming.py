"""Streaming accumulation equals the two-pass estimator in float64, in the error measure that float32 allows.

The bound. An entry of K is a sum of D = C*T float32 products of exactly scaled deviations. With u = 2^-24, D products
and additions in any order err by at most (D + 1) u sum |x_i x_j| (Higham 2002, (3.5)), and Cauchy-Schwarz makes that
(D + 1) u sqrt(K_ii K_jj). Each deviation carries two roundings (the difference, its storage), the rows of the chain or
panel means and the final division a few more: (D + 12) u sqrt(K_ii K_jj) bounds all of it when means are float64.
(Means in float32 lose this: near a loss of 2 their rounding is 1e-4 of a deviation of 1e-3.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

import lossk
import oracles
from lossk.accumulate.tiles import TileAccumulator
from streamed_kernels import kernel_from_panels

Panels = Iterator[tuple[int, Tensor]]
MIXED_PANELS = (1, 4, 2, 7)


def panels(losses: np.ndarray, size: int | tuple[int, ...]) -> Panels:
    """The traces [C, T, N] cut into panels of the given sizes in turn; a chain's last panel may be shorter."""
    sizes = (size,) if isinstance(size, int) else size
    for chain, trace in enumerate(losses):
        start = turn = 0
        while start < len(trace):
            stop = start + sizes[turn % len(sizes)]
            yield chain, torch.from_numpy(trace[start:stop].copy())
            start, turn = stop, turn + 1


def correlated(rng: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    """Unit-variance traces [C, T, N] with real correlations of both signs and chain means that differ."""
    chains, draws, n = shape
    shared = rng.standard_normal((chains, draws, 3)) @ rng.standard_normal((3, n))
    own = rng.standard_normal(shape) + 0.5 * rng.standard_normal((chains, 1, n))
    return (shared + own) / 2


def near_two(rng: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    return 2 + 1e-3 * correlated(rng, shape)


def wide(rng: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    """Standard deviations from 1e-7 to 3, losses of the size of their deviation."""
    sd = np.geomspace(1e-7, 3, shape[2])
    return sd * (4 + correlated(rng, shape))


def tiny(rng: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    """Standard deviations from 1e-20 to 1: the variance of the smallest is not a normal float32."""
    sd = np.geomspace(1e-20, 1, shape[2])
    return sd * (4 + correlated(rng, shape))


def late(rng: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    """Samples that do not move at all in the first five draws of the first chain, and others that move only there."""
    losses = 1 + correlated(rng, shape)
    losses[0, :5, ::3] = 1.0
    losses[0, 5:, 1::3] = 1.0
    losses[1:, :, 1::3] = 1.0
    return losses


def outgrown(rng: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    """Deviations of 1e-25 in the first draws and of 1 later: their square, in units of the first scale, overflows."""
    losses = correlated(rng, shape)
    losses[0, :9, ::3] *= 1e-25
    return losses


KINDS = [correlated, near_two, wide, tiny, late, outgrown]


def run(
    losses: np.ndarray, size: int | tuple[int, ...], tile: int, centering: str = "chain", dtype: str = "float32"
) -> lossk.LossKernel:
    chains, draws, n = losses.shape
    return kernel_from_panels(
        panels(losses, size), n, num_chains=chains, num_draws=draws, tile=tile, centering=centering, dtype=dtype
    )


def assert_close(kernel: lossk.LossKernel, losses: np.ndarray, centering: str) -> None:
    exact = oracles.two_pass(losses, centering)
    scale = np.sqrt(np.outer(np.diag(exact), np.diag(exact)))
    u = (losses.shape[0] * losses.shape[1] + 12) * oracles.UNIT32
    n = losses.shape[2]
    everything = range(n)
    covariance = kernel[list(everything), list(everything)].double().numpy()
    error = np.abs(covariance - exact)
    assert np.all(error <= u * scale + oracles.TINY32), f"covariance: {np.max(error / scale):.3g}, bound {u:.3g}"
    r = kernel.correlation(list(everything), list(everything)).double().numpy()
    error = np.abs(r - oracles.correlation(exact))
    assert np.all(error <= 2 * u), f"correlation: {np.max(error):.3g}, bound {2 * u:.3g}"
    assert not np.asarray(kernel.dead).any()
    # A symmetric perturbation with entries up to e moves eigenvalues by at most n e.
    assert np.linalg.eigvalsh(r)[0] >= -n * 2 * u


@pytest.mark.parametrize("kind", KINDS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("chains", [1, 3])
@pytest.mark.parametrize("size", [1, 7, MIXED_PANELS, 23], ids=str)
@pytest.mark.parametrize("centering", ["chain", "pooled"])
def test_equals_two_pass(
    kind: Callable[..., np.ndarray], chains: int, size: int | tuple[int, ...], centering: str
) -> None:
    """N = 37 against tiles of 16; 23 draws against panels of 1, 7, mixed sizes and all at once."""
    losses = kind(np.random.default_rng(chains), (chains, 23, 37)).astype(np.float32)
    assert_close(run(losses, size, 16, centering), losses, centering)


@pytest.mark.parametrize(("n", "tile"), [(2, 16), (3, 48), (16, 16), (17, 16), (31, 32), (53, 16), (53, 4096)])
def test_ragged_tiles(n: int, tile: int) -> None:
    losses = near_two(np.random.default_rng(n), (2, 11, n)).astype(np.float32)
    assert_close(run(losses, 4, tile), losses, "chain")


def test_two_draws() -> None:
    losses = near_two(np.random.default_rng(8), (2, 2, 5)).astype(np.float32)
    assert_close(run(losses, 1, 16), losses, "chain")


def test_many_one_draw_panels_do_not_drift() -> None:
    """The mean row of every update is a place to lose digits: 600 of them, near 2."""
    losses = near_two(np.random.default_rng(9), (1, 600, 9)).astype(np.float32)
    assert_close(run(losses, 1, 16), losses, "chain")


def test_the_panel_is_not_changed() -> None:
    losses = near_two(np.random.default_rng(11), (1, 6, 5)).astype(np.float32)
    panel = torch.from_numpy(losses[0].copy())
    accumulator = TileAccumulator(5, 16, num_chains=1, num_draws=6)
    accumulator.update(0, panel)
    np.testing.assert_array_equal(panel.numpy(), losses[0])
    accumulator.finalize()


@pytest.mark.parametrize("kind", [correlated, wide, tiny], ids=lambda f: f.__name__)
@pytest.mark.parametrize("centering", ["chain", "pooled"])
def test_float16_tiles(kind: Callable[..., np.ndarray], centering: str) -> None:
    """Tiles hold K_ij / (s_i s_j), s a power of two near the standard deviation of the first panel.

    Rounding once to float16 costs 2^-11 |K_ij|, and below float16's normal range 2^-25 s_i s_j. Here the first panel
    holds 12 of 40 draws, so s <= 4 sd whatever the rounding of its logarithm, and the absolute part is at most
    2^-21 sd_i sd_j, beside the float32 error of the accumulation.
    """
    losses = kind(np.random.default_rng(12), (2, 20, 37)).astype(np.float32)
    exact = oracles.two_pass(losses, centering)
    scale = np.sqrt(np.outer(np.diag(exact), np.diag(exact)))
    bound = oracles.UNIT16 * np.abs(exact) + (2.0**-21 + 52 * oracles.UNIT32) * scale + oracles.TINY32
    kernel = run(losses, 12, 16, centering, "float16")
    assert kernel.dtype == "float16"
    got = kernel[:, :]
    assert got.dtype == torch.float32
    assert np.all(np.abs(got.double().numpy() - exact) <= bound)
    r = kernel.correlation(slice(None), slice(None)).double().numpy()
    # R divides by two standard deviations, each known to 2^-12 relative when read from a float16 diagonal.
    assert np.all(np.abs(r - oracles.correlation(exact)) <= bound / scale + 2.0**-11 + 2.0**-21)
    assert np.linalg.eigvalsh(r)[0] >= -37 * 2.0**-10


def test_float16_tiles_survive_a_poor_first_panel() -> None:
    """One draw says nothing about a standard deviation: entries must neither overflow nor vanish."""
    losses = tiny(np.random.default_rng(13), (2, 20, 21)).astype(np.float32)
    r = run(losses, 1, 16, "chain", "float16").correlation(slice(None), slice(None)).double().numpy()
    assert np.all(np.abs(r - oracles.correlation(oracles.two_pass(losses))) <= 2.0**-9)


def test_dead_samples() -> None:
    """Constant losses, also ones that no short sum of float32 reproduces: exactly zero, flagged, never NaN."""
    losses = near_two(np.random.default_rng(14), (2, 13, 20)).astype(np.float32)
    constant = [0, 7, 19]
    losses[:, :, constant] = np.float32([0.1, 0.0, 1e-20])
    for size in (1, 3, 13):
        kernel = run(losses, size, 16)
        assert np.flatnonzero(np.asarray(kernel.dead)).tolist() == constant
        block = kernel[constant, :].numpy()
        np.testing.assert_array_equal(block, 0)
        r = kernel.correlation(slice(None), slice(None)).numpy()
        expected = np.zeros((3, 20))
        expected[range(3), constant] = 1
        np.testing.assert_array_equal(r[constant], expected)
        np.testing.assert_array_equal(r[:, constant], expected.T)
        assert np.isfinite(r).all()


def test_a_sample_constant_within_each_chain() -> None:
    """Dead under chain centering; under pooled centering its variance is the spread of the chain means."""
    losses = near_two(np.random.default_rng(15), (3, 8, 6)).astype(np.float32)
    losses[:, :, 2] = np.float32([1.0, 2.0, 4.0])[:, None]
    losses[:, :, 3] = 1e-20 * np.float32([1.0, 5.0, 2.0])[:, None]
    chain, pooled = run(losses, 3, 16), run(losses, 3, 16, "pooled")
    assert np.flatnonzero(np.asarray(chain.dead)).tolist() == [2, 3]
    assert_close(pooled, losses, "pooled")
