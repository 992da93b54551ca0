"""The commands on a planted store: files hold what the library says, bad input is one clear line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas
import pytest
import torch

import lossk
from lossk.analysis import significant_neighbors
from lossk.cli.main import main
from planted import planted_kernel

LABELS = torch.arange(80) % 4
TREE = "tree:\n  up: [a, b]\n  down: [c, d]\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("insight")
    planted_kernel(LABELS // 2, dead=2).save(where / "a.lossk")
    planted_kernel(LABELS // 2, seed=1).save(where / "b.lossk")
    (where / "labels.txt").write_text("\n".join("abcd"[i] for i in LABELS.tolist()))
    np.save(where / "labels.npy", LABELS.numpy())
    (where / "tree.yaml").write_text(TREE)
    return where


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_neighbors(folder: Path, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / f"near.{suffix}"
    assert run("neighbors", folder / "a.lossk", "--k", 3, "--rows", 5, 7, "--anti", "--out", out) == 0
    table = pandas.read_csv(out) if suffix == "csv" else pandas.read_parquet(out)
    found = significant_neighbors(lossk.open(folder / "a.lossk"), 3, [5, 7], anti=True)
    assert table["sample"].tolist() == [5, 5, 5, 7, 7, 7]
    assert table["rank"].tolist() == [1, 2, 3, 1, 2, 3]
    assert table["neighbor"].tolist() == found.index.reshape(-1).tolist()
    np.testing.assert_allclose(table["correlation"], found.correlation.reshape(-1).numpy(), rtol=1e-6)
    assert "above the noise floor" in capsys.readouterr().out


def test_map(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outs = tmp_path / "map.csv", tmp_path / "map.png"
    arguments = ["--num-neighbors", 8, "--labels", folder / "labels.txt", "--out", outs[0], "--out", outs[1]]
    assert run("map", folder / "a.lossk", *arguments) == 0
    table = pandas.read_csv(outs[0])
    assert len(table) == 80
    assert table["x0"].isna().tolist() == [False] * 78 + [True] * 2
    assert table["label"].tolist()[:4] == ["a", "b", "c", "d"]
    assert outs[1].read_bytes()[:4] == b"\x89PNG"
    assert "2 clusters" in capsys.readouterr().out


def test_hierarchy_with_a_taxonomy(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outs = tmp_path / "align.parquet", tmp_path / "tree.png"
    arguments = ["--labels", folder / "labels.txt", "--taxonomy", folder / "tree.yaml"]
    assert run("hierarchy", folder / "a.lossk", *arguments, "--out", outs[0], "--out", outs[1]) == 0
    table = pandas.read_parquet(outs[0])
    row = table[(table.similarity == "mean R") & (table.reference == "wu_palmer") & (table.statistic == "triplets")]
    assert row["value"].tolist() == [1.0]
    assert outs[1].read_bytes()[:4] == b"\x89PNG"
    assert "4 classes, 78 live samples" in capsys.readouterr().out


def test_hierarchy_alone(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "classes.csv"
    assert run("hierarchy", folder / "a.lossk", "--labels", folder / "labels.npy", "--out", out) == 0
    table = pandas.read_csv(out)
    assert len(table) == 10
    assert table.mean_r[table.class_a.eq(0) & table.class_b.eq(1)].item() == pytest.approx(0.7, abs=0.1)
    assert table.chain_error.notna().all()


def test_compare(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "both.csv"
    assert run("compare", folder / "a.lossk", folder / "b.lossk", "--k", 4, "--out", out) == 0
    text = capsys.readouterr().out
    assert "78 samples live in both" in text
    assert "centered kernel alignment" in text
    assert len(pandas.read_csv(out)) == 80


def test_labels_of_the_config(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planted_kernel(torch.arange(9) % 3).save(tmp_path / "x.lossk")
    assert run("map", tmp_path / "x.lossk", "--labels", "config") == 2
    assert "there is no config file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["map", "{}/a.lossk", "--out", "x.jpg"], "--out must end in .parquet, .csv, .png, got 'x.jpg'"),
        (["neighbors", "{}/a.lossk", "--out", "{}/labels.npy"], "--out must end in .parquet, .csv"),
        (["hierarchy", "{}/a.lossk", "--labels", "{}/none.txt"], "there is no file"),
        (["hierarchy", "{}/a.lossk", "--labels", "{}/tree.yaml"], "one label per sample, 80, got 3"),
        (["hierarchy", "{}/a.lossk", "--labels", "{}/labels.npy", "--taxonomy", "fashion"], "not '0'"),
        (["hierarchy", "{}/a.lossk", "--labels", "{}/labels.txt", "--taxonomy", "{}/labels.txt"], "one mapping"),
        (["compare", "{}/a.lossk", "{}/c.lossk"], "there is no store"),
    ],
)
def test_bad_input(arguments: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*(argument.format(folder) for argument in arguments)) == 2
    assert message in capsys.readouterr().err


def test_nothing_is_overwritten(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "near.csv"
    out.write_text("mine")
    assert run("neighbors", folder / "a.lossk", "--out", out) == 2
    assert "pass --overwrite" in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert run("neighbors", folder / "a.lossk", "--out", out, "--overwrite") == 0
    assert out.read_text().startswith("sample,rank,neighbor")
