"""Scores of attributions where the right answer is known; the benchmarks that use them, tiny."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from bench.studies import lds, mislabels
from torch import Tensor, nn

import lossk
from lossk.analysis.baselines import Baseline
from lossk.analysis.evaluate import (
    auroc,
    linear_datamodeling_score,
    random_subsets,
    randomisation_check,
    retrain_on_subsets,
)
from lossk.analysis.influence_functions import damped_influence

# --- AUROC -------------------------------------------------------------------------------------------------------


def test_auroc_counts_pairs() -> None:
    wrong = torch.tensor([True, False, True, False, False])
    assert auroc(torch.tensor([9.0, 1.0, 8.0, 2.0, 3.0]), wrong)[0] == 1.0
    assert auroc(-torch.tensor([9.0, 1.0, 8.0, 2.0, 3.0]), wrong)[0] == 0.0
    assert auroc(torch.zeros(5), wrong)[0] == 0.5
    assert auroc(torch.tensor([5.0, 4.0, 2.0, 3.0, 1.0]), wrong)[0] == pytest.approx(4 / 6)


def test_auroc_error_is_that_of_chance_scores() -> None:
    """Without signal the variance is (n1 + n2 + 1) / (12 n1 n2) (Mann and Whitney 1947)."""
    wrong = torch.arange(400) < 80
    value, error = auroc(torch.randn(400), wrong)
    expected = (401 / (12 * 80 * 320)) ** 0.5
    assert abs(value - 0.5) < 4.5 * expected
    assert 0.75 * expected < error < 1.3 * expected


def test_bad_scores() -> None:
    wrong = torch.tensor([True, False])
    with pytest.raises(ValueError, match="scores must be finite, sample 1 is not"):
        auroc(torch.tensor([0.0, torch.nan]), wrong)
    with pytest.raises(ValueError, match="must mark some samples and not others, got 2 of 2"):
        auroc(torch.zeros(2), torch.tensor([True, True]))
    with pytest.raises(ValueError, match=r"must be \[N\]"):
        auroc(torch.zeros(3), wrong)


# --- linear datamodeling score -----------------------------------------------------------------------------------


def test_an_exactly_linear_world_scores_one() -> None:
    masks, truth = random_subsets(40, 30), torch.randn(40, 7)
    outcomes = 5.0 - masks.double() @ truth.double()
    found = linear_datamodeling_score(truth, masks, outcomes)
    np.testing.assert_allclose(found.per_query, 1.0)
    assert found.mean == pytest.approx(1.0)
    assert found.standard_error < 1e-9
    assert linear_datamodeling_score(-truth, masks, outcomes).mean == pytest.approx(-1.0)
    outcomes[:, 2] = 1.0
    constant = linear_datamodeling_score(truth, masks, outcomes)
    assert torch.isnan(constant.per_query).tolist() == [False, False, True, False, False, False, False]
    assert constant.mean == pytest.approx(1.0)


def test_unrelated_attributions_score_nothing_within_the_error() -> None:
    """20 worlds of independent outcomes: the scores spread as their bootstrap errors say, within a factor of 2."""
    z = []
    for seed in range(20):
        masks = random_subsets(30, 40, seed=seed)
        found = linear_datamodeling_score(torch.randn(30, 10), masks, torch.randn(40, 10), num_bootstrap=60)
        z.append(found.mean / found.standard_error)
    assert 0.3 < float(np.std(z)) < 1.5
    assert abs(float(np.mean(z))) < 1.5


def test_exact_influence_predicts_retraining_of_a_ridge_regression() -> None:
    """Refitted in closed form on 60 halves of 200 samples; influence with the exact curvature. Not exactly linear, as a
    half changes the curvature too: a score of 0.9."""
    rng = np.random.default_rng(3)
    x, q = rng.standard_normal((200, 4)), rng.standard_normal((20, 4))
    w_true, ridge = rng.standard_normal(4), 0.05
    # Queries far from the fit: of a small residual the loss would be the square of its change, which is not linear.
    y, y_query = x @ w_true + rng.standard_normal(200), q @ w_true + rng.choice([-3.0, 3.0], 20)

    def fit(rows: np.ndarray) -> np.ndarray:
        part = x[rows]
        return np.linalg.solve(part.T @ part + ridge * len(rows) * np.eye(4), part.T @ y[rows])

    def train(rows: Tensor, seed: int) -> Tensor:
        return torch.from_numpy((q @ fit(rows.numpy()) - y_query) ** 2)

    masks = random_subsets(200, 60)
    outcomes = retrain_on_subsets(train, masks, progress=False)
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(fit(np.arange(200))).float()[None])
    data = torch.from_numpy(x).float(), torch.from_numpy(y).float()
    queries = torch.from_numpy(q).float(), torch.from_numpy(y_query).float()
    base = damped_influence(
        model, lossk.ProbeSets(t=data, q=queries), train=data, damping=2 * ridge, loss="mse", curvature="hessian"
    )
    found = linear_datamodeling_score(base[base.sets["t"], base.sets["q"]], masks, outcomes)
    assert found.mean > 0.9, found


def test_subsets_are_of_one_size_and_repeat() -> None:
    masks = random_subsets(11, 50, fraction=0.3, seed=4)
    assert masks.sum(dim=1).tolist() == [3] * 50
    assert torch.equal(masks, random_subsets(11, 50, fraction=0.3, seed=4))
    assert not torch.equal(masks, random_subsets(11, 50, fraction=0.3, seed=5))
    assert len(masks.unique(dim=0)) > 30
    assert float(masks.double().mean(dim=0).min()) > 0.1, "every sample is in some"
    with pytest.raises(ValueError, match="fraction must leave some"):
        random_subsets(11, 5, fraction=1.0)


def test_retraining_sees_rows_and_seeds() -> None:
    calls = []

    def train(rows: Tensor, seed: int) -> Tensor:
        calls.append((rows.tolist(), seed))
        return torch.tensor([float(seed), float(len(rows))])

    masks = torch.tensor([[True, False, True], [False, True, True]])
    outcomes = retrain_on_subsets(train, masks, seeds=(1, 4), progress=False)
    assert calls == [([0, 2], 1), ([0, 2], 4), ([1, 2], 1), ([1, 2], 4)]
    assert outcomes.tolist() == [[2.5, 2.0], [2.5, 2.0]]
    with pytest.raises(ValueError, match="train must return finite losses"):
        retrain_on_subsets(lambda rows, seed: torch.tensor([torch.nan]), masks, progress=False)
    with pytest.raises(ValueError, match="seeds must hold at least one"):
        retrain_on_subsets(train, masks, seeds=(), progress=False)
    with pytest.raises(ValueError, match=r"masks must be \[S, n\] bool"):
        retrain_on_subsets(train, masks.long(), progress=False)


def test_shapes_that_do_not_fit() -> None:
    masks = random_subsets(10, 5)
    with pytest.raises(ValueError, match=r"helpfulness must be \[n, q\].*got \[9, 2\], \[5, 10\] and \[5, 2\]"):
        linear_datamodeling_score(torch.zeros(9, 2), masks, torch.zeros(5, 2))
    with pytest.raises(ValueError, match="outcomes must be finite"):
        linear_datamodeling_score(torch.zeros(10, 2), masks, torch.full((5, 2), torch.inf))


# --- randomisation -----------------------------------------------------------------------------------------------


def test_a_random_network_is_told_from_a_trained_one() -> None:
    labels = torch.arange(90) % 3
    planted = torch.eye(3)[labels] + 0.3 * torch.randn(90, 3)
    trained, untrained = Baseline("trained", planted), Baseline("random", torch.randn(90, 40))
    found = randomisation_check(trained, untrained, labels, k=5)
    assert abs(found.pearson) < 0.2
    assert found.purity_trained > 0.9
    assert abs(found.purity_random - found.purity_chance) < 0.15
    same = randomisation_check(trained, trained, labels, most=30)
    assert same.pearson == pytest.approx(1.0)
    assert same.spearman == pytest.approx(1.0)
    assert same.purity_random == same.purity_trained
    with pytest.raises(ValueError, match="of the same samples, got 90, 90 and 89"):
        randomisation_check(trained, untrained, labels[:89])


# --- the benchmarks, tiny ----------------------------------------------------------------------------------------


def test_bench_lds_runs(tmp_path: Path) -> None:
    out, record = tmp_path / "lds.md", tmp_path / "lds.json"
    lds.main([
        "--out", str(out), "--record", str(record), "--seeds", "2", "--subsets", "6", "--num-train", "40",
        "--num-query", "20", "--hidden", "3", "--epochs", "2", "--num-chains", "1", "--num-draws", "4",
    ])  # fmt: skip
    found = json.loads(record.read_text())["found"]
    assert len(found["scores"]) == 8
    assert all(-1 <= score["lds"] <= 1 and score["error"] >= 0 for score in found["scores"].values())
    assert out.read_text().count("\n| ") == 10
    assert "nan" not in out.read_text()


@pytest.mark.slow  # the pilot and the trial chains of a convolutional network
def test_bench_mislabels_runs(tmp_path: Path) -> None:
    out, record = tmp_path / "m.md", tmp_path / "m.json"
    mislabels.main([
        "--out", str(out), "--record", str(record), "--seeds", "2", "--num-train", "120", "--epochs", "1",
        "--num-chains", "1", "--num-draws", "2", "--num-test", "100",
    ])  # fmt: skip
    runs = json.loads(record.read_text())["runs"]
    assert [set(run["auroc"]) == set(mislabels.NAMES) for run in runs] == [True, True]
    assert all(0 <= value <= 1 for run in runs for value in run["auroc"].values())
    assert out.read_text().count("\n| ") == 10
    assert "nan" not in out.read_text()


def test_noise_moves_labels_to_other_classes() -> None:
    labels = torch.randint(0, 10, (1000,))
    given, wrong = mislabels.noisy_labels(labels, 0.05, np.random.default_rng(0))
    assert int(wrong.sum()) == 50
    assert torch.equal(given != labels, wrong)
    assert int(given.min()) >= 0
    assert int(given.max()) <= 9
    assert len(((given - labels) % 10)[wrong].unique()) == 9
