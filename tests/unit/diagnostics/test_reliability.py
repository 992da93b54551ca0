"""What two halves of a run agree on, and what that foretells of another run of its length."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lossk.diagnostics.diagnostics import _growth
from lossk.diagnostics.reliability import _halves, mean_error, reliability, size_error, times_as_many
from lossk.diagnostics.verdict import GROWN, GROWN_Z


def traces(seed: int, chains: int, draws: int, *, samples: int = 40, rank: int = 12, heavy: float = 0.0) -> Tensor:
    """[C, T, w]: samples that share `rank` movements, the same ones for every seed, and have some of their own.

    Args:
        heavy: the losses are exp(heavy times these), heavier-tailed the larger it is.
    """
    shared = torch.randn(rank, samples, dtype=torch.float64, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    moves = torch.randn(chains, draws, rank, dtype=torch.float64, generator=generator) @ shared / rank**0.5
    own = torch.randn(chains, draws, samples, dtype=torch.float64, generator=generator)
    return (heavy * (moves + own)).exp() if heavy else moves + own


def agreement(one: Tensor, other: Tensor) -> tuple[float, float]:
    """(of R, of K): the correlation over pairs of what two runs say."""
    pairs = tuple(torch.triu_indices(one.shape[2], one.shape[2], offset=1))
    kernels = [(run - run.mean(dim=1, keepdim=True)).flatten(0, 1).T.cov() for run in (one, other)]
    sizes = [kernel.diagonal().sqrt() for kernel in kernels]
    of_r = [(kernel / torch.outer(size, size))[pairs] for kernel, size in zip(kernels, sizes, strict=True)]
    return tuple(float(torch.stack(two).corrcoef()[0, 1]) for two in (of_r, [kernel[pairs] for kernel in kernels]))


@pytest.mark.parametrize("chains", [1, 2, 4, 5])
@pytest.mark.parametrize("draws", [40, 400])
@pytest.mark.parametrize("heavy", [0.0, 1.0])
def test_it_foretells_what_another_run_agrees_on(chains: int, draws: int, heavy: float) -> None:
    """Within .1 on average over ten pairs of runs; heavy tails make truth itself vary, and more is allowed."""
    foretold, came = [], []
    for seed in range(10):
        one, other = (traces(2 * seed + k, chains, draws, heavy=heavy) for k in (0, 1))
        foretold.append(reliability(one))
        came.append(agreement(one, other))
    error = (torch.tensor(foretold) - torch.tensor(came)).mean(dim=0).abs()
    assert (error < (0.2 if heavy else 0.1)).all(), (foretold, came)


def test_halves_of_the_same_numbers_agree_wholly() -> None:
    same = traces(0, 1, 50).expand(4, -1, -1)
    assert reliability(same) == (pytest.approx(1.0), pytest.approx(1.0))


def test_unrelated_samples_have_nothing_to_agree_on() -> None:
    noise = torch.randn(4, 60, 80, generator=torch.Generator().manual_seed(1))
    for found in reliability(noise):
        assert found is not None
        assert abs(found) < 0.15


def test_splits_are_halves() -> None:
    for chains in range(2, 9):
        for one, other in _halves(chains):
            assert len(one) == len(other) == chains // 2
            assert not set(one) & set(other)
    assert len(list(_halves(4))) == 3


@pytest.mark.parametrize(
    "losses",
    [torch.ones(4, 20, 9), torch.full((4, 20, 9), math.nan), torch.rand(4, 1, 9), torch.rand(4, 20, 2),
     torch.rand(1, 2, 9), torch.rand(1, 3, 9)],
)  # fmt: skip
def test_unknown_where_nothing_can_be_said(losses: Tensor) -> None:
    assert reliability(losses) == (None, None)


def test_samples_that_never_vary_are_left_out() -> None:
    losses = traces(3, 4, 60)
    dead = torch.cat([losses, torch.ones(4, 60, 5, dtype=torch.float64)], dim=2)
    assert reliability(dead) == reliability(losses)


def test_two_draws_a_chain_say_something() -> None:
    for found in reliability(traces(0, 8, 2)):
        assert found is not None
        assert math.isfinite(found)


def test_draws_that_are_wanted_follow_spearman_and_brown() -> None:
    more = times_as_many(0.5, 0.8)
    assert more == pytest.approx(4.0)
    assert more * 0.5 / (1 + (more - 1) * 0.5) == pytest.approx(0.8)
    assert times_as_many(0.0, 0.8) == math.inf


@pytest.mark.parametrize("chains", [1, 4])
def test_the_size_of_a_kernel_is_known_as_well_as_it_is_said(chains: int) -> None:
    """Of the sum of variances over 60 runs, the spread is that which each says, within a third."""
    runs = [traces(seed, chains, 400 // chains) for seed in range(60)]
    totals = torch.stack([run.var(dim=1).sum(dim=1).mean() for run in runs])
    said = [size_error(run) for run in runs]
    assert all(value is not None for value in said)
    mean = sum(value for value in said if value is not None) / len(said)
    assert mean / (float(totals.std()) / float(totals.mean())) == pytest.approx(1.0, abs=1 / 3)
    assert size_error(torch.ones(4, 20, 9)) is None
    assert size_error(torch.full((4, 20, 9), math.nan)) is None
    assert math.isnan(mean_error(torch.ones(2, 9).numpy()))


@pytest.mark.parametrize("directions", [4, 40])
@pytest.mark.parametrize("memory", [0.0, 0.5, 0.9, 0.97])
def test_growth_of_what_stands_still_is_seldom_told(memory: float, directions: int) -> None:
    """Squares of autoregressive directions, 4 chains of 100 draws, at their stationary law."""
    generator = torch.Generator().manual_seed(int(1000 * memory))
    told = 0
    for _ in range(40):
        noise = torch.randn(4, 100, directions, dtype=torch.float64, generator=generator)
        for t in range(1, 100):
            noise[:, t] = memory * noise[:, t - 1] + (1 - memory**2) ** 0.5 * noise[:, t]
        growth, z = _growth(noise.square().sum(dim=2))
        assert growth is not None
        assert z is not None
        told += growth > GROWN and z > GROWN_Z
    assert told <= 1
