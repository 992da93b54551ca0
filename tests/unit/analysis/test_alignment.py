"""Alignment with a taxonomy: planted agreement, statistics by brute force, and Mantel tests that hold their level."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from lossk.analysis import Alignment, ClassMatrix, Taxonomy, align, class_similarity, triplet_agreement
from lossk.analysis.alignment import _concordance, partition_purity
from lossk.analysis.mantel import mantel, partial_spearman
from planted import planted_kernel

TREE = Taxonomy.from_nested({"up": ["a", "b", "c"], "down": ["d", "e"]})
PARTS = {"two": [0, 0, 0, 1, 1]}


def symmetric(rng: np.random.Generator, count: int) -> np.ndarray:
    """Similarities of random points, as real ones are: entries that share a class depend on one another."""
    x = rng.standard_normal((count, 2))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x @ x.T


@pytest.fixture(scope="module")
def planted() -> Alignment:
    """Samples of classes 0..2 share a block of losses, those of 3 and 4 another: the tree's two branches."""
    labels = torch.arange(100) % 5
    kernel = planted_kernel((labels > 2).long())
    found = class_similarity(kernel, labels, list("abcde"), num_bootstrap=30)
    return align({"kernel": found.signed, "noise": symmetric(np.random.default_rng(0), 5)}, TREE, partitions=PARTS)


def test_planted_branches_align(planted: Alignment) -> None:
    assert planted.row("kernel", "wu_palmer", "triplets").value == 1.0
    assert planted.row("kernel", "two", "purity").value == 1.0
    assert planted.row("kernel", "two", "nmi").value == pytest.approx(1.0)
    assert planted.row("kernel", "two", "ari").value == 1.0
    rho = planted.row("kernel", "wu_palmer", "spearman")
    assert rho.value > 0.8
    # Of 5! relabellings the 3! 2! that keep the branches give the same tree; ties of ranks let few others reach it.
    assert rho.permutations == 120
    assert rho.p == pytest.approx(12 / 120, abs=0.02)
    assert 0 <= rho.image_error < 0.1
    assert np.isfinite(rho.chain_error)


def test_a_given_matrix_has_no_error_bars(planted: Alignment) -> None:
    row = planted.row("noise", "wu_palmer", "spearman")
    assert np.isnan(row.image_error)
    assert np.isnan(row.chain_error)
    assert len(planted.records()) == len(planted.rows)
    text = planted.markdown("wu_palmer", ["spearman", "triplets", "nothing"])
    assert text.count("\n") == 3
    assert "| kernel | " in text
    assert "–" in text


def test_statistics_by_their_definitions() -> None:
    rng = np.random.default_rng(1)
    s, target = symmetric(rng, 6), np.round(symmetric(rng, 6), 1)
    found = align({"s": s}, {"t": target})
    upper = np.triu_indices(6, 1)
    assert found.row("s", "t", "spearman").value == pytest.approx(stats.spearmanr(s[upper], target[upper]).statistic)
    assert found.row("s", "t", "kendall").value == pytest.approx(stats.kendalltau(s[upper], target[upper]).statistic)
    agree = total = 0.0
    for a, b, c in itertools.permutations(range(6), 3):
        if target[a, b] > target[a, c]:
            total += 1
            agree += s[a, b] > s[a, c]
    assert triplet_agreement(s, target) == pytest.approx(agree / total)
    assert triplet_agreement(-s, target) == pytest.approx(1 - agree / total)
    assert np.isnan(triplet_agreement(s, np.ones((6, 6))))


def test_long_rows_count_the_same_pairs() -> None:
    rng = np.random.default_rng(2)
    x, y = rng.integers(0, 9, 90).astype(float), rng.integers(0, 9, 90).astype(float)
    pairs = list(itertools.combinations(range(90), 2))
    products = [np.sign(x[i] - x[j]) * np.sign(y[i] - y[j]) for i, j in pairs]
    assert _concordance(x, y) == pytest.approx((sum(products), sum(y[i] != y[j] for i, j in pairs)))
    assert _concordance(np.ones(90), y)[0] == 0.0


def test_partial_correlation_is_that_of_residuals() -> None:
    rng = np.random.default_rng(3)
    a, b, c, d = (symmetric(rng, 7) for _ in range(4))
    upper = np.triu_indices(7, 1)
    ranks = [stats.rankdata(x[upper]) for x in (a, b, c, d)]
    design = np.stack([np.ones(21), ranks[2], ranks[3]], axis=1)
    left, right = (r - design @ np.linalg.lstsq(design, r, rcond=None)[0] for r in ranks[:2])
    assert partial_spearman(a, b, [c, d]) == pytest.approx(np.corrcoef(left, right)[0, 1])
    assert np.isnan(partial_spearman(a, b, [a]))  # nothing is left of a
    assert mantel(a, b, controls=[a]).p == 1.0


def test_exact_p_is_the_share_of_relabellings() -> None:
    rng = np.random.default_rng(4)
    a, b = symmetric(rng, 5), symmetric(rng, 5)
    upper = np.triu_indices(5, 1)
    found = mantel(a, b, alternative="greater")
    rho = [
        stats.spearmanr(a[np.ix_(order, order)][upper], b[upper]).statistic
        for order in map(list, itertools.permutations(range(5)))
    ]
    assert found.exact
    assert found.permutations == 120
    assert found.p == pytest.approx(np.mean(np.array(rho) >= found.statistic - 1e-12))
    assert mantel(a, b).p == pytest.approx(np.mean(np.abs(rho) >= abs(found.statistic) - 1e-12))
    assert mantel(a, a, alternative="greater").p == pytest.approx(1 / 120)


@pytest.mark.parametrize("alternative", ["greater", "two-sided"])
@pytest.mark.parametrize("partial", [False, True])
def test_p_is_uniform_under_the_null(alternative: str, partial: bool) -> None:
    """Two independent similarities of 9 classes, 99 random relabellings: p is uniform on 0.01, 0.02, ..., 1.

    Of a partial test, given a third that is independent of both.
    """
    ps = []
    for seed in range(300):
        rng = np.random.default_rng(np.random.SeedSequence(entropy=5, spawn_key=(seed,)))
        a, b, c = (symmetric(rng, 9) for _ in range(3))
        found = mantel(a, b, controls=[c] if partial else [], alternative=alternative, num_permutations=99, seed=seed)
        assert not found.exact
        ps.append(found.p)
    jitter = np.random.default_rng(6).uniform(0, 0.01, len(ps))  # from the grid to the continuous law
    assert stats.kstest(np.array(ps) - jitter, "uniform").pvalue > 0.01


def test_random_relabellings_agree_with_all_of_them() -> None:
    rng = np.random.default_rng(7)
    a = symmetric(rng, 9)
    b = a + 0.7 * symmetric(rng, 9)
    first, again = (mantel(a, b, num_permutations=2000, seed=1) for _ in range(2))
    assert first == again
    assert first.p < 0.01


def test_purity() -> None:
    assert partition_purity(np.array([0, 0, 0, 1, 1]), np.array([0, 0, 1, 1, 1])) == pytest.approx(4 / 5)


def test_a_control_is_not_held_against_itself() -> None:
    rng = np.random.default_rng(8)
    s, pixels = symmetric(rng, 5), symmetric(rng, 5)
    found = align({"s": s, "pixels": pixels}, TREE, controls={"pixels": pixels, "other": symmetric(rng, 5)})
    assert {r.statistic for r in found.rows if r.similarity == "s"} >= {"partial", "partial | pixels"}
    assert "partial | pixels" not in {r.statistic for r in found.rows if r.similarity == "pixels"}


@pytest.mark.parametrize(
    ("similarities", "settings", "message"),
    [
        ({}, {}, "must not be empty"),
        ({"s": np.eye(4)}, {}, r"s must be \[5, 5\], got \[4, 4\]"),
        ({"s": np.triu(np.ones((5, 5)))}, {}, "s must be symmetric"),
        ({"s": np.full((5, 5), np.nan)}, {}, "s must be finite"),
        ({"s": np.eye(5)}, {"partitions": {"p": [0, 1]}}, "one part per class, 5, got 2"),
        ({"s": np.eye(5)}, {"alternative": "less"}, "alternative must be one of"),
    ],
)
def test_bad_arguments(similarities: dict, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        align(similarities, TREE, **settings)


def test_a_similarity_that_says_nothing() -> None:
    found = align({"flat": ClassMatrix(np.full((5, 5), 0.5))}, TREE)
    row = found.row("flat", "wu_palmer", "spearman")
    assert np.isnan(row.value)
    assert row.p == 1.0
    assert found.row("flat", "wu_palmer", "triplets").value == 0.5
