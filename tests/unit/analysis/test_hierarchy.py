"""Class means against dense, streamed ones; their standard errors against the spread over fresh data; dendrograms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import lossk
from lossk.analysis import class_similarity, dendrogram
from lossk.analysis.class_matrix import ClassMatrix
from planted import planted_kernel, planted_traces

NAMES = ["a", "b", "c"]


def dense_means(r: np.ndarray, labels: np.ndarray, live: np.ndarray) -> np.ndarray:
    out = np.empty((3, 3))
    pairs = np.outer(live, live) & ~np.eye(len(r), dtype=bool)
    for a in range(3):
        for b in range(3):
            out[a, b] = r[pairs & np.outer(labels == a, labels == b)].mean()
    return out


def check(source: lossk.LossKernel | Tensor, r: np.ndarray, labels: Tensor, live: np.ndarray) -> None:
    found = class_similarity(source, labels, NAMES, num_bootstrap=20)
    np.testing.assert_allclose(found.matrix, dense_means(r, labels.numpy(), live), rtol=0, atol=1e-6)
    np.testing.assert_allclose(found.absolute.matrix, dense_means(np.abs(r), labels.numpy(), live), rtol=0, atol=1e-6)
    assert found.counts.tolist() == [int(((labels == c).numpy() & live).sum()) for c in range(3)]


def test_factor_form_against_dense() -> None:
    labels = torch.arange(70) % 3
    kernel = planted_kernel(labels, dead=3)
    check(kernel, kernel.to_numpy(correlation=True).astype(np.float64), labels, (~kernel.dead).numpy())


@pytest.mark.parametrize("tile", [16, 32])
def test_ragged_tiles_against_dense(tile: int, problem, build) -> None:
    kernel = build(problem.model(), problem.data, tile=tile)  # 21 samples
    r = kernel.to_numpy(correlation=True).astype(np.float64)
    check(kernel, r, problem.targets, np.ones(21, dtype=bool))


def test_features_and_arrays() -> None:
    features = torch.randn(50, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    unit = (features / features.norm(dim=1, keepdim=True)).numpy()
    labels = torch.arange(50) % 3
    check(features, unit @ unit.T, labels, np.ones(50, dtype=bool))
    check(features @ features.T, unit @ unit.T, labels, np.ones(50, dtype=bool))


def test_errors_over_images_are_the_spread_over_images() -> None:
    """Class means of features whose samples are drawn anew each time: the bootstrap must foretell their spread."""
    labels = torch.arange(120) % 3
    generator = torch.Generator().manual_seed(2)
    centers = torch.randn(3, 6, generator=generator, dtype=torch.float64)

    def one() -> np.ndarray:
        x = centers[labels] + 2 * torch.randn(120, 6, generator=generator, dtype=torch.float64)
        found = class_similarity(x, labels, NAMES, num_bootstrap=60)
        assert found.signed.image_error is not None
        return np.stack([found.matrix, found.signed.image_error])

    runs = np.stack([one() for _ in range(40)])
    spread, foretold = runs[:, 0].std(axis=0, ddof=1), runs[:, 1].mean(axis=0)
    # A spread of 40 runs is itself known to 1 / sqrt(78) = 11 %; 3.5 of those for the largest of six.
    np.testing.assert_allclose(foretold, spread, rtol=0.4)


def test_errors_over_chains_are_the_spread_over_chains() -> None:
    """One class pair of traces drawn anew: few effective draws, so that chains disagree."""
    labels = torch.arange(30) % 3

    def one(seed: int) -> np.ndarray:
        traces = planted_traces(labels, shared=0.5, num_chains=6, num_draws=10, seed=seed)
        found = class_similarity(lossk.LossKernel.from_traces(traces), labels, NAMES, num_bootstrap=0)
        assert found.signed.chain_error is not None
        assert found.signed.images is None
        return np.stack([found.matrix, found.signed.chain_error])

    runs = np.stack([one(seed) for seed in range(40)])
    spread = runs[:, 0].std(axis=0, ddof=1)
    foretold = np.sqrt(np.square(runs[:, 1]).mean(axis=0))
    np.testing.assert_allclose(
        foretold, spread, rtol=0.45
    )  # 11 % of the spread, 5 % of the mean of jackknives; six of them


def test_no_error_over_chains_of_tiles(problem, build) -> None:
    found = class_similarity(build(problem.model(), problem.data), problem.targets, NAMES)
    assert found.signed.chains is None
    assert np.isnan(found.signed.estimate(lambda m: m[0, 1]).chain_error)


def test_many_images_are_drawn_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lossk.analysis.hierarchy.MOST_GROUPS", 15)
    labels = torch.arange(90) % 3
    found = class_similarity(planted_kernel(labels), labels, NAMES)
    assert found.signed.groups == 5
    assert np.isfinite(found.signed.image_error).all()


def test_a_class_of_one_and_of_none() -> None:
    labels = torch.tensor([0] * 9 + [1])
    found = class_similarity(planted_kernel(labels), labels, NAMES, num_bootstrap=30)
    assert np.isnan(found.matrix[1, 1])
    assert np.isnan(found.matrix[2]).all()
    assert np.isfinite(found.matrix[0, :2]).all()


@pytest.mark.parametrize(
    ("labels", "message"),
    [(torch.zeros(5), r"labels must be \[9\], got \[5\]"), (torch.full((9,), 3), "labels must be from 0 to 2, got 3")],
)
def test_bad_labels(labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        class_similarity(planted_kernel(torch.arange(9) % 3), labels, NAMES)


def test_dendrogram_of_two_pairs() -> None:
    s = np.array([[1, 0.9, 0.1, 0.1], [0.9, 1, 0.1, 0.1], [0.1, 0.1, 1, 0.6], [0.1, 0.1, 0.6, 1]])
    tree = dendrogram(ClassMatrix(s), ["w", "x", "y", "z"])
    parts = tree.cut(2)
    assert parts[0] == parts[1] != parts[2] == parts[3]
    assert tree.cophenetic[0, 1] == pytest.approx((2 * 0.1) ** 0.5)
    assert tree.cophenetic[0, 3] == pytest.approx((2 * 0.9) ** 0.5)
    assert tree.cophenetic_correlation == pytest.approx(1.0)
    with pytest.raises(ValueError, match="at most 1"):
        dendrogram(2 * s, ["w", "x", "y", "z"])
