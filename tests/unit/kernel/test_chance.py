"""Noise floors and `by_chance` where the laws are known to be unrelated, in both forms, and where they are not."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from bench.calibration_floors import CASES, floors_table, losses_of, section
from scipy import stats

import lossk
from lossk.analysis import significant_neighbors
from lossk.analysis.neighbors import _false_shares
from lossk.forms.blocks import TileBlocks
from lossk.kernel.chance import Chance, _slow, _unit, null_correlations
from lossk.kernel.chance_tail import Tails, coordinate

NEGATED = np.where(np.arange(400) % 2, -1.0, 1.0)


def kernel_of(losses: np.ndarray) -> lossk.LossKernel:
    return lossk.LossKernel.from_traces(lossk.LossTraces(torch.from_numpy(losses.astype(np.float32))))


def as_tiles(kernel: lossk.LossKernel, *, watched: bool = True) -> lossk.LossKernel:
    whole = {(0, 0): kernel.contents.blocks.gather(torch.arange(len(kernel)), torch.arange(len(kernel)))}
    beside = kernel._watched() if watched else None
    return lossk.LossKernel(TileBlocks(len(kernel), len(kernel), whole), kernel.contents.moments, watched=beside)


@pytest.mark.parametrize(
    ("case", "chains", "draws"),
    [
        ("blocks", 2, 400),
        ("exp(2z)", 4, 50),
        ("z, half AR(.98)", 4, 50),
        ("exp(z), AR(.9)", 4, 50),
        ("z, AR(.98)", 4, 50),
    ],
)
@pytest.mark.parametrize("anti", [False, True])
@pytest.mark.parametrize("form", ["factor", "tiles"])
def test_unrelated_samples_pass_as_often_as_promised(case: str, chains: int, draws: int, form: str, anti: bool) -> None:
    """About one a row above the floor, a tenth of one at by_chance 0.1, a hundredth at 0.01.

    The 400 rows' counts are of pairs that share traces; over seeds their means have errors of 5, 11, and 30 %.
    """
    losses, related = losses_of(case, np.random.default_rng([3, chains, draws]), chains, draws)
    kernel = kernel_of(losses) if form == "factor" else as_tiles(kernel_of(losses))
    found = significant_neighbors(kernel, 60, anti=anti)
    unrelated = ~related[np.arange(400)[:, None], found.index.numpy()]
    rows = (~related).sum() / 399
    assert 0.6 < (found.significant.numpy() & unrelated).sum() / rows < 1.3
    assert ((found.by_chance.numpy() < 0.1) & unrelated).sum() / rows < 1.5 * 0.1
    assert ((found.by_chance.numpy() < 0.01) & unrelated).sum() <= stats.poisson.isf(0.001, 0.015 * rows)
    assert found.null == ("rows" if form == "factor" else "watched")


def test_each_sign_has_its_own_law() -> None:
    """Skewed losses coincide upwards; with every other loss negated, half of the rest coincide downwards."""
    losses, _ = losses_of("exp(z)", np.random.default_rng(8), 4, 100)
    plain, mixed = kernel_of(losses), kernel_of(losses * NEGATED)
    up, down = plain.neighbors(1).noise_floor, plain.neighbors(1, anti=True).noise_floor
    assert float(down.median()) < 0.75 * float(up.median())
    assert float(mixed.neighbors(1, anti=True).noise_floor.median()) > 1.2 * float(down.median())


def test_memories_of_its_own_make_a_row_s_floor() -> None:
    """A row without memory meets the same noise whatever its partners' memory; a slow row meets more from slow ones."""
    losses, _ = losses_of("z, half AR(.98)", np.random.default_rng(2), 4, 200)
    floor, slow = kernel_of(losses).neighbors(1).noise_floor.numpy(), np.arange(400) % 4 >= 2
    assert np.median(floor[slow]) > 3 * np.median(floor[~slow])
    assert np.median(floor[~slow]) == pytest.approx(stats.norm.isf(1 / 400) / np.sqrt(796), rel=0.05)


@pytest.mark.parametrize("rows", [[7], [399, 0, 0], slice(100, 300)])
def test_floors_of_some_rows_are_those_of_all(rows) -> None:
    losses, _ = losses_of("blocks", np.random.default_rng(1), 3, 60)
    for kernel in (kernel_of(losses), as_tiles(kernel_of(losses))):
        whole, some = kernel.neighbors(2).noise_floor, kernel.neighbors(2, rows=rows).noise_floor
        np.testing.assert_array_equal(some, whole[rows])


def test_a_store_without_watched_traces_keeps_the_formula(tmp_path: Path) -> None:
    losses, _ = losses_of("z", np.random.default_rng(1), 4, 60)
    with_traces, without = as_tiles(kernel_of(losses)), as_tiles(kernel_of(losses), watched=False)
    for kernel, null in ((with_traces, "watched"), (without, "lag1")):
        kernel.save(tmp_path / f"{null}.lossk")
        assert significant_neighbors(lossk.open(tmp_path / f"{null}.lossk"), 3).null == null
    np.testing.assert_allclose(with_traces.neighbors(1).noise_floor, without.neighbors(1).noise_floor, rtol=0.1)


@pytest.mark.parametrize("chains", [1, 2, 3, 6])
def test_any_number_of_chains(chains: int) -> None:
    """Also one, whose traces are turned around, and many, of whose orders a few are taken."""
    losses, _ = losses_of("z^2", np.random.default_rng(5), chains, 480 // chains)
    kernel = kernel_of(losses)
    r, floor = kernel.to_numpy(correlation=True), kernel.neighbors(1).noise_floor.numpy()
    np.fill_diagonal(r, -1)
    assert 0.8 < (r[40:] > floor[40:, None]).sum(axis=1).mean() < 1.25


def test_too_few_draws_or_samples_keep_the_formula() -> None:
    rng = np.random.default_rng(4)
    for shape in ((4, 3, 40), (1, 15, 40), (4, 50, 15)):
        kernel = kernel_of(rng.standard_normal(shape))
        assert kernel._chance.method == "lag1"
        assert kernel.neighbors(1).noise_floor.isfinite().all()
    assert Chance(None, kernel.contents.moments, lambda: None).method == "lag1"


def test_diagnostics_state_the_calibrated_floor() -> None:
    losses, _ = losses_of("exp(z)", np.random.default_rng(6), 4, 100)
    kernel = kernel_of(losses)
    assert kernel.diagnostics is not None
    assert kernel.diagnostics.noise_floor == pytest.approx(float(kernel.neighbors(1).noise_floor.median()), rel=0.15)


def test_null_correlations_are_of_other_chains() -> None:
    rng = np.random.default_rng(0)
    rows, partners = (rng.standard_normal((3 * 5, n)).astype(np.float32) for n in (4, 2))
    found = null_correlations(torch.from_numpy(rows), torch.from_numpy(partners), [((1, 2, 0), 0), ((2, 0, 1), 3)], 3)
    for m, (order, turn) in enumerate([((1, 2, 0), 0), ((2, 0, 1), 3)]):
        for i, j in itertools.product(range(4), range(2)):
            chains = partners[:, j].reshape(3, 5)
            turned = np.concatenate([np.roll(chains[c], turn) for c in order])
            assert found[i, j, m] == pytest.approx(float(rows[:, i] @ turned), rel=1e-5, abs=1e-5)


def test_two_slow_paths_are_not_turned() -> None:
    rng = np.random.default_rng(0)
    rows, partners = (torch.from_numpy(rng.standard_normal((2 * 8, n)).astype(np.float32)) for n in (3, 2))
    torn = torch.tensor([[True, False], [False, False], [True, True]])
    plain, turned, found = (
        null_correlations(rows, partners, [((1, 0), turn)], 2, which)[:, :, 0]
        for turn, which in ((0, None), (3, None), (3, torn))
    )
    np.testing.assert_array_equal(found, np.where(torn.numpy(), plain, turned))


def test_slow_samples_are_told_from_others_one_by_one() -> None:
    losses, _ = losses_of("z, half AR(.98)", np.random.default_rng(3), 2, 400)
    slow = _slow(_unit(kernel_of(losses)._blocks.take(torch.arange(400))), 2).numpy()
    assert slow[np.arange(400) % 4 >= 2].mean() > 0.95
    assert slow[np.arange(400) % 4 < 2].mean() < 0.03


def test_two_chains_of_mixed_memories_know_a_rare_chance() -> None:
    """Against a nominal of 12: these would be 3 times as many if fast samples were not turned against slow ones."""
    below = 0
    for seed in range(6):
        losses, related = losses_of("exp(z), half AR(.98)", np.random.default_rng([seed, 2, 60]), 2, 60)
        found = significant_neighbors(kernel_of(losses), 5)
        unrelated = ~related[np.arange(400)[:, None], found.index.numpy()]
        below += int(((found.by_chance.numpy() < 0.005) & unrelated).sum())
    assert below <= stats.poisson.isf(0.001, 1.5 * 0.005 * 400 * 6)


def test_a_tail_of_few_rows_is_foreseen_longer() -> None:
    """The same draws from 1,000 rows or 5: both alike where draws are, and the few rows surer of nothing beyond."""
    draws = stats.genpareto(0.2).rvs(size=20_000, random_state=np.random.default_rng(1))
    many, few = (Tails.of([draws.reshape(rows, -1)]) for rows in (1000, 5))
    which, g = np.zeros(2, dtype=int), np.array([2.0, 60.0])
    a, b = (tails.survival(which, g) for tails in (many, few))
    assert a[0] == b[0]
    assert b[1] > 2 * a[1] > 1e-6


@pytest.mark.parametrize("law", [stats.expon(), stats.pareto(4), stats.uniform()])
def test_tails_are_right_and_beyond_the_draws_not_too_thin(law) -> None:
    draws = law.rvs(size=(10, 20_000), random_state=np.random.default_rng(1)) - law.support()[0]
    tails, which = Tails.of([draws]), np.zeros(1, dtype=int)
    for share in (0.3, 1e-2, 1e-3):
        g = tails.quantile(which, share)
        assert g[0] == pytest.approx(law.isf(share) - law.support()[0], rel=0.08)
        assert tails.survival(which, g)[0] == pytest.approx(share, rel=1e-6)
    assert tails.quantile(which, 1e-8)[0] > 0.5 * (law.isf(1e-8) - law.support()[0])


def test_coordinate_of_normal_losses_is_minus_the_log_of_their_share() -> None:
    """Within the half of a logarithm by which Student's t differs from an exponential."""
    r = np.array([0.3, 0.5, 0.7])
    share = stats.t.sf(r * np.sqrt(98 / (1 - r**2)), 98)
    np.testing.assert_allclose(coordinate(r, np.full(3, 98.0)), -np.log(share), rtol=0.35)


def test_false_shares_are_benjamini_and_hochberg_s() -> None:
    p = np.random.default_rng(3).uniform(size=(5, 40)) ** 3
    np.testing.assert_allclose(_false_shares(40 * p), np.stack([stats.false_discovery_control(row) for row in p]))
    assert np.isnan(_false_shares(np.array([[0.1, np.nan, 0.2]]))).tolist() == [[False, True, False]]


@pytest.mark.parametrize("case", ["z", "blocks"])
def test_few_discoveries_are_false(case: str) -> None:
    """At a share of 0.05: none or next to none among unrelated samples, and few beside the related ones."""
    losses, related = losses_of(case, np.random.default_rng(11), 4, 200)
    found = significant_neighbors(kernel_of(losses), 20)
    kept = found.table_false_share.numpy() <= 0.05
    false = kept & ~related[np.arange(400)[:, None], found.index.numpy()]
    assert kept.sum() >= (40 if case == "z" else 1500)
    assert false.sum() <= 0.08 * kept.sum()
    by_row = found.row_false_share.numpy() <= 0.05
    assert (by_row & ~kept).sum() < 0.05 * by_row.size


def test_the_table_has_every_case() -> None:
    assert len(CASES) == 11
    rows = floors_table(1, ("z",))
    assert len(rows) == 12
    assert section(rows).count("\n") == 7
