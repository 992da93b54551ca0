"""Ranked influences and mislabel scores against brute force and planted truths; the command line."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lossk
from lossk.analysis import attribution
from lossk.analysis.attribution import class_scores, influence, mislabel_ranking, mislabel_scores
from lossk.analysis.baselines import Baseline
from lossk.analysis.evaluate import auroc
from lossk.cli import main as cli

HELPS, HARMS = 3, 11  # training samples planted for query 0


def planted(num_draws: int = 200) -> lossk.LossKernel:
    """30 training and 4 query samples of independent losses, but that query 0 moves with one and against another."""
    losses = 2.0 + 0.3 * torch.randn(4, num_draws, 34)
    signal = torch.randn(4, num_draws)
    losses[..., 30] += signal
    losses[..., HELPS] += signal
    losses[..., HARMS] -= 2 * signal
    losses[..., 7] = 1.0  # dead
    return lossk.LossKernel.from_traces(lossk.LossTraces(losses, sets={"train": slice(0, 30), "query": slice(30, 34)}))


# --- influence ---------------------------------------------------------------------------------------------------


def test_the_planted_samples_come_first_with_their_signs() -> None:
    """Cov = +1 and -2 nats^2 by construction, each within 5 of its own standard errors."""
    found = influence(lossk.CrossKernel(planted()), top=3)
    assert int(found.helpful.samples[0, 0]) == HELPS
    assert int(found.harmful.samples[0, 0]) == HARMS
    for ranked, truth in ((found.helpful, -1.0), (found.harmful, 2.0)):
        assert abs(float(ranked.influence[0, 0]) - truth) < 5 * float(ranked.standard_error[0, 0])
        assert bool(ranked.significant[0, 0])
        assert float(ranked.correlation[0, 0]) * truth < 0, "R has the kernel's sign, BIF the other"
    assert not (found.helpful.significant | found.harmful.significant)[:, 1:].all()


@pytest.mark.parametrize("by", ["influence", "correlation"])
def test_it_is_the_sorted_kernel_whatever_the_block(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cross = lossk.CrossKernel(planted())
    found = influence(cross, top=30, by=by)
    block = cross[:] if by == "influence" else cross.correlation()
    np.testing.assert_array_equal(block.T.gather(1, found.helpful.row), block.T.sort(dim=1, descending=True).values)
    np.testing.assert_array_equal(block.T.gather(1, found.harmful.row), block.T.sort(dim=1).values)
    for j in range(4):
        rows = found.helpful.row[j]
        np.testing.assert_allclose(found.helpful.influence[j], -cross[rows, [j]].squeeze(1))
        np.testing.assert_allclose(found.helpful.standard_error[j], cross.standard_error(rows, [j]).squeeze(1))
        np.testing.assert_allclose(
            found.helpful.correlation_error[j], cross.standard_error(rows, [j], correlation=True).squeeze(1)
        )
    np.testing.assert_array_equal(found.noise_floor, cross.noise_floor)
    monkeypatch.setattr(attribution, "ENTRIES", 1)
    again = influence(cross, top=30, by=by)
    assert torch.equal(again.helpful.row, found.helpful.row)
    assert torch.equal(again.harmful.influence, found.harmful.influence)


def test_few_unrelated_samples_stand_above_the_floor() -> None:
    """The floor is the quantile 1 - 1/n of a tail: of n unrelated samples one on either side, 2 in all, per query."""
    losses = torch.randn(2, 100, 600)
    kernel = lossk.LossKernel.from_traces(lossk.LossTraces(losses))
    found = influence(lossk.CrossKernel(kernel, slice(0, 500), slice(500, 600)), top=500)
    per_query = found.helpful.significant.double().sum(dim=1)
    assert abs(float(per_query.mean()) - 2.0) < 4.5 * (2.0 / 100) ** 0.5  # Poisson over 100 queries


def test_a_table_has_one_row_per_rank() -> None:
    found = influence(lossk.CrossKernel(planted()), top=30)
    frame = found.to_frame()
    helpful, harmful = frame[frame.kind == "helpful"], frame[frame.kind == "harmful"]
    assert (helpful.influence < 0).all()
    assert (harmful.influence > 0).all()
    assert len(frame) == 4 * 29, "a dead sample neither helps nor harms"
    first = helpful[helpful["query"] == 0].iloc[0]
    assert (first["rank"], first.train, bool(first.significant)) == (1, HELPS, True)
    assert list(frame.columns)[:5] == ["query", "kind", "rank", "train", "influence"]


def test_bad_requests() -> None:
    cross = lossk.CrossKernel(planted(20))
    with pytest.raises(ValueError, match="top must be from 1 to 30, got 31"):
        influence(cross, top=31)
    with pytest.raises(ValueError, match="by must be one of"):
        influence(cross, by="loss")


# --- wrong labels ------------------------------------------------------------------------------------------------


def classes(num_samples: int = 60) -> tuple[lossk.LossKernel, Tensor, Tensor]:
    """Losses that move with a factor of the true class; 5 samples carry another class's label, and one is dead."""
    true = torch.arange(num_samples) % 3
    factors = torch.randn(2, 150, 3)
    losses = 1.0 + factors[..., true] + 0.5 * torch.randn(2, 150, num_samples)
    losses[..., 20] = 0.5
    wrong = torch.zeros(num_samples, dtype=torch.bool)
    wrong[[4, 17, 30, 41, 58]] = True
    losses[..., wrong] = 2 * losses[..., wrong] + 3.0  # more of it, and higher
    given = torch.where(wrong, (true + 1) % 3, true)
    return lossk.LossKernel.from_traces(lossk.LossTraces(losses)), given, wrong


def test_scores_are_what_they_say() -> None:
    kernel, given, _ = classes()
    scores = mislabel_scores(kernel, given)
    assert tuple(sorted(scores)) == tuple(sorted(attribution.SCORES))
    np.testing.assert_array_equal(scores["mean_loss"], kernel.mean_loss)
    np.testing.assert_array_equal(scores["self_influence"], kernel.variance)
    r = kernel.to_numpy(correlation=True).astype(np.float64)
    labels = given.numpy()
    np.fill_diagonal(r, 0.0)
    means = np.stack([r[:, labels == c].sum(1) / ((labels == c).sum() - (labels == c)) for c in range(3)], 1)
    own = means[np.arange(60), labels]
    rest = np.where(np.eye(3, dtype=bool)[labels], -np.inf, means).max(1)
    for name, expected in (("class_correlation", -own), ("class_margin", rest - own)):
        live = np.arange(60) != 20
        np.testing.assert_allclose(scores[name][live], expected[live], atol=1e-5)
        assert float(scores[name][20]) == float(scores[name].min()), "of a dead sample nothing is known: it comes last"


def test_every_score_finds_the_planted_labels() -> None:
    kernel, given, wrong = classes()
    for name, score in mislabel_scores(kernel, given).items():
        assert auroc(score, wrong)[0] > 0.99, name
        order, ranked = mislabel_ranking(kernel, given, score=name)
        assert set(order[:5].tolist()) == set(wrong.nonzero().squeeze(1).tolist())
        assert torch.equal(ranked, score)


def test_traces_will_do_and_so_will_a_baseline() -> None:
    kernel, given, wrong = classes()
    losses = torch.randn(2, 10, 8)
    traces = lossk.LossTraces(losses)
    order, score = mislabel_ranking(traces)
    expected = lossk.LossKernel.from_traces(traces)
    assert torch.equal(score, mislabel_scores(expected)[attribution.DEFAULT_SCORE])
    assert torch.equal(order, torch.argsort(score, descending=True))
    values, vectors = kernel.eigsh(30)
    found = class_scores(Baseline("eigenvectors", vectors * values.sqrt()), given)
    assert auroc(found["class_margin"], wrong)[0] > 0.99


def test_bad_labels() -> None:
    kernel, given, _ = classes()
    with pytest.raises(ValueError, match=r"labels must be integers \[60\]"):
        mislabel_scores(kernel, given[:59])
    with pytest.raises(ValueError, match=r"labels must be integers \[60\]"):
        mislabel_scores(kernel, given.double())
    lonely = given.clone()
    lonely[0] = 9
    with pytest.raises(ValueError, match="at least 2 classes with at least 2 samples each, got 4 classes"):
        mislabel_scores(kernel, lonely)
    with pytest.raises(ValueError, match="needs labels, got None"):
        mislabel_ranking(kernel, score="class_margin")
    with pytest.raises(ValueError, match="score must be one of"):
        mislabel_ranking(kernel, given, score="loss")


# --- the command line --------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Path:
    planted().save(tmp_path / "k.lossk")
    return tmp_path / "k.lossk"


def test_attribute_writes_the_table(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import pandas as pd

    expected = influence(lossk.CrossKernel(lossk.open(store)), top=4).to_frame()
    for name in ("x.csv", "x.parquet"):
        out = tmp_path / name
        assert cli.main(["attribute", str(store), "--query", "query", "--top", "4", "--out", str(out)]) == 0
        read = pd.read_csv(out) if name == "x.csv" else pd.read_parquet(out)
        pd.testing.assert_frame_equal(read, expected, check_dtype=False, rtol=1e-5)
    text = capsys.readouterr().out
    assert f"helpful  {HELPS} (-" in text
    assert f"harmful  {HARMS} (" in text
    assert ")*" in text
    assert f"wrote {tmp_path / 'x.parquet'}" in text


def test_attribute_takes_rows(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["attribute", str(store), "--query", "30,32-33", "--train", "0-29", "--by", "correlation"]) == 0
    text = capsys.readouterr().out
    assert "query 30 " in text
    assert "query 33 " in text
    assert f"helpful  {HELPS} (-" in text
    assert cli.main(["attribute", str(store), "--query", "query", "--train", "all", "--top", "50"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--query", "test"], "query must name a set of the kernel, got 'test'; its sets are train, query"),
        (["--query", "99"], "row 99 is not among the 34 rows of the kernel"),
        (["--query", "query", "--out", "x.json"], "--out must end in .csv or .parquet"),
        (["--query", "query", "--out", "nowhere/x.csv"], "there is no folder 'nowhere'"),
        (["--query", "query", "--top", "0"], "--top must be at least 1"),
    ],
    ids=["set", "row", "suffix", "folder", "top"],
)
def test_attribute_refuses(store: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["attribute", str(store), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_attribute_overwrites_only_when_told(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.csv"
    out.write_text("mine")
    arguments = ["attribute", str(store), "--query", "query", "--out", str(out)]
    assert cli.main(arguments) == 2
    assert out.read_text() == "mine"
    assert cli.main([*arguments, "--overwrite"]) == 0
    assert out.read_text().startswith("query,kind,rank")
    find: Any = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pyarrow" else find(name))
    assert cli.main([*arguments[:-1], str(tmp_path / "x.parquet")]) == 2
    assert 'pip install "lossk[analysis]"' in capsys.readouterr().err
