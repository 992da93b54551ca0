"""`lossk verify`: silent on good stores, and naming exactly what is wrong with others."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

import lossk
from damage import seal_again
from lossk.accumulate.runlog import RunLog
from lossk.cli import main as cli
from lossk.store.verify import verify_store
from streamed_kernels import kernel_from_panels

FORMS = ["tiles", "float16 tiles", "pooled tiles", "factor", "stored factor", "stored pooled factor"]


def make_losses(num_samples: int = 53) -> np.ndarray:
    rng = np.random.default_rng(0)
    shared = rng.standard_normal((2, 9, 3)) @ rng.standard_normal((3, num_samples))
    losses = shared + rng.standard_normal((2, 9, num_samples)) + rng.standard_normal((2, 1, num_samples))
    losses *= 10.0 ** rng.uniform(-7, 0, num_samples)
    losses[:, :, 16:33] = 0.5  # a whole tile of dead samples
    return losses.astype(np.float32)


def save(form: str, path: Path) -> Path:
    losses, centering = make_losses(), "pooled" if "pooled" in form else "chain"
    if "stored" in form:
        with lossk.TraceWriter(
            path, num_chains=2, num_draws=9, num_samples=53, chunk=16, centering=centering
        ) as writer:
            writer.append(losses)
    elif form == "factor":
        lossk.LossKernel.from_traces(lossk.LossTraces(losses)).save(path)
    else:
        panels = [(c, torch.from_numpy(losses[c, t : t + 4].copy())) for c in range(2) for t in range(0, 9, 4)]
        settings: dict[str, Any] = {"num_chains": 2, "num_draws": 9, "tile": 16, "centering": centering}
        kernel_from_panels(panels, 53, **settings, dtype=form.split()[0] if "float" in form else "float32").save(path)
    return path


@pytest.mark.parametrize("form", FORMS)
def test_good_stores(form: str, tmp_path: Path) -> None:
    found = verify_store(save(form, tmp_path / "k.lossk"), side=20)
    assert found.problems == []
    text = "\n".join(found.checks)
    assert "8 random blocks of 20 samples" in text
    assert ("factor" if "factor" in form else "tiles") + ": float" in text


def test_a_run_s_store(build: Callable, problem: Any, tmp_path: Path) -> None:
    """Its losses are there too, and their covariance is the kernel."""
    for settings in ({}, {"dtype": "float16"}, {"centering": "pooled"}):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.lossk"
        build(problem.model(), problem.data, out=path, **settings)
        found = verify_store(path)
        assert found.problems == []
        assert any("covariance of their losses" in check for check in found.checks)


def test_tokens(tmp_path: Path) -> None:
    tokens = torch.stack([torch.arange(53) // 7, torch.arange(53) % 7], dim=1)
    lossk.LossTraces(make_losses(), tokens=tokens).save(tmp_path / "k.lossk")
    assert verify_store(tmp_path / "k.lossk").ok
    (tmp_path / "k.lossk/tokens/c/0/0").unlink()
    assert verify_store(tmp_path / "k.lossk").problems == ["tokens: chunk 0, 0 is missing"]


def test_nothing_but_dead_samples(tmp_path: Path) -> None:
    lossk.LossKernel.from_traces(lossk.LossTraces(np.ones((1, 3, 4), np.float32))).save(tmp_path / "k.lossk")
    assert verify_store(tmp_path / "k.lossk").ok


# --- damage ------------------------------------------------------------------------------------------------------


def chunk_files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if "c" in file.relative_to(path).parts[:-1] and file.is_file())


def flip(file: Path, at: int = 9) -> None:
    content = bytearray(file.read_bytes())
    content[at % len(content)] ^= 16
    file.write_bytes(content)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty"])
@pytest.mark.parametrize("form", ["tiles", "factor", "stored factor"])
def test_every_damaged_chunk_is_named(form: str, damage: str, tmp_path: Path) -> None:
    """One at a time, in every array: the problem names the array and the chunk."""
    good = save(form, tmp_path / "good.lossk")
    for file in chunk_files(good):
        path = tmp_path / "bad.lossk"
        shutil.copytree(good, path)
        bad = path / file.relative_to(good)
        if damage == "flipped":
            flip(bad)
        else:
            bad.write_bytes(b"" if damage == "empty" else bad.read_bytes()[:-5])
        name, _, *place = file.relative_to(good).parts
        problems = verify_store(path).problems
        assert problems, file
        assert problems[0].startswith(f"{name}: chunk {', '.join(place)} is damaged: "), problems
        assert len(problems) == 1
        shutil.rmtree(path)


@pytest.mark.parametrize("form", ["tiles", "factor", "stored factor"])
def test_every_lost_chunk_is_noticed(form: str, tmp_path: Path) -> None:
    """By its name; a lost variance, by the diagonal that it is not."""
    good = save(form, tmp_path / "good.lossk")
    for file in chunk_files(good):
        path = tmp_path / "bad.lossk"
        shutil.copytree(good, path)
        (path / file.relative_to(good)).unlink()
        name, _, *place = file.relative_to(good).parts
        problems = verify_store(path).problems
        if name == "complete":
            assert problems == [f"complete: chunk {place[0]} is missing"]
        elif name == "variance":
            assert any("variance" in problem for problem in problems), problems
        else:
            assert problems[0] == f"{name}: chunk {', '.join(place)} is missing"
        shutil.rmtree(path)


def rewritten(path: Path, name: str, change: Callable[[np.ndarray], None]) -> list[str]:
    """Problems after numbers were changed and written back, with right checksums of chunks, and then of files."""
    with zarr.config.set({"array.write_empty_chunks": True}):
        array = zarr.open_array(path / name, mode="r+")
    values = np.asarray(array[...])
    change(values)
    array[...] = values
    assert any(problem.startswith(f"{name}: chunk ") for problem in verify_store(path, side=20).problems)
    seal_again(path)
    return verify_store(path, side=20).problems


def times(factor: float, *place: Any) -> Callable[[np.ndarray], None]:
    def change(values: np.ndarray) -> None:
        values[place] *= factor

    return change


@pytest.mark.parametrize(
    ("form", "name", "change", "message"),
    [
        ("tiles", "tiles", times(1.5, 3, 4), r"tiles: chunk 0, 0 is not symmetric: entries \[3, 4\] and \[4, 3\]"),
        ("tiles", "tiles", times(1.001, 40, 40), "tiles: chunk 2, 2 has a diagonal .*of 1 samples, the first 40"),
        ("tiles", "tiles", times(np.nan, 2, 50), r"chunk 0, 3 holds 1 non-finite numbers, the first at \[2, 50\]"),
        ("tiles", "tiles", times(1e4, 2, 50), r"chunk 0, 3: entry \[2, 50\] is larger than the variances"),
        ("tiles", "tiles", times(-1, slice(0, 16), slice(48, 53)), "not positive semi-definite: least eigenvalue"),
        ("tiles", "variance", times(1.01, 7), "has a diagonal that is not the variance, of 1 samples, the first 7"),
        ("stored factor", "factor", times(1.1, slice(None), 35), "factor: chunk 0, 2 has squares .* the first 35"),
        ("factor", "scale", times(3, 2), "scale: sample 2 has .*, not a power of two"),
        ("factor", "mean", times(1.1, 2), "mean: of sample 2 is not the average of its chain_mean"),
        ("factor", "variance", times(-1, 2), "variance: sample 2 has a negative one"),
    ],
)
def test_wrong_numbers(form: str, name: str, change: Callable, message: str, tmp_path: Path) -> None:
    path = save(form, tmp_path / "k.lossk")
    problems = rewritten(path, name, change)
    assert re.search(message, problems[0]), problems
    assert len(problems) <= 2, problems  # an entry that is wrong may spoil a random block too


def test_losses_of_another_kernel(build: Callable, problem: Any, tmp_path: Path) -> None:
    build(problem.model(), problem.data, out=tmp_path / "k.lossk")
    (found,) = rewritten(tmp_path / "k.lossk", "losses", times(1.01, 0, 2))
    assert "the covariance of their losses differ by" in found


@pytest.mark.parametrize("what", ["zarr.json", "tiles/zarr.json", "config.json", "mean/zarr.json"])
def test_broken_descriptions(what: str, tmp_path: Path) -> None:
    path = save("tiles", tmp_path / "k.lossk")
    (path / what).write_text("{")
    assert any(problem.startswith(what.split("/")[0]) for problem in verify_store(path).problems)
    if "/" in what:
        shutil.rmtree((path / what).parent)
        assert f"{what.split('/')[0]}: the array is missing" in verify_store(path).problems


def test_an_unfinished_store(build: Callable, problem: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says how far it got; a committed panel that is lost or damaged is named."""
    path, commit = tmp_path / "k.lossk", RunLog.commit

    def stopping(log: RunLog, new: Any, **how: Any) -> None:
        commit(log, new, **how)
        if len(log.commits) == 2:
            raise RuntimeError("stopped by the test")

    monkeypatch.setattr(RunLog, "commit", stopping)
    with pytest.raises(RuntimeError, match="stopped by the test"):
        build(problem.model(), problem.data, out=path)
    (problem_,) = verify_store(path).problems
    assert problem_.startswith("unfinished: 6 of 12 draws are saved")
    flip(path / "losses/c/0/1/0")
    (path / "losses/c/0/0/0").unlink()
    _, lost, damaged = verify_store(path).problems
    assert damaged.startswith("losses: chunk 0, 1, 0 is damaged")
    assert lost == "losses: chunk 0, 0, 0 is missing"


# --- the command -------------------------------------------------------------------------------------------------


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save("tiles", tmp_path / "k.lossk")
    assert cli.main(["verify", str(path)]) == 0
    told = capsys.readouterr().out
    assert told.count("ok     ") >= 4
    assert told.endswith("k.lossk: whole and consistent\n")
    flip(path / "tiles/c/0/3")
    flip(path / "tiles/c/2/2")
    assert cli.main(["verify", str(path)]) == 1
    told = capsys.readouterr().out
    assert "WRONG  tiles: chunk 0, 3 is damaged: Stored and computed checksum do not match" in told
    assert told.endswith("k.lossk: 2 problems\n")
    assert cli.main(["verify", str(tmp_path / "absent.lossk")]) == 2
    assert "there is no store" in capsys.readouterr().err


def test_info_of_traces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save("stored factor", tmp_path / "k.lossk")
    assert cli.main(["info", str(path)]) == 0
    assert "factor in float16" in capsys.readouterr().out
    assert cli.main(["info", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_samples"] == 53
