"""A recipe that keeps checkpoints: its kernel through training, at one law, from the command line."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_recipes import write_fashion

import lossk
from lossk.analysis.compare import compare_kernels
from lossk.cli.main import main
from lossk.recipes import fashion

FIXED = {"lr": 1e-4, "n_beta": 50, "localization": 100, "num_burnin_steps": 2, "num_steps_bw_draws": 1}


def arguments(folder: Path) -> list[str]:
    """`lossk run fashion` on 300 generated images, three epochs."""
    task_args = {"data": folder, "epochs": 3, "num_probe": 40, "required_accuracy": 0, "checkpoints": folder / "kept"}
    build = {"num_chains": 2, "num_draws": 10, "tile": 16}
    out = ["run", "fashion", "--out", str(folder / "f.lossk"), "--set", "picture=null", "--set", "sampler={}"]
    for section, values in (("task_args", task_args), ("build", build), ("sampler", FIXED)):
        out += [part for key, value in values.items() for part in ("--set", f"{section}.{key}={value}")]
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fashion")
    write_fashion(folder)
    assert main(arguments(folder)) == 0
    return folder


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "f.checkpoints.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_checkpoint_has_a_row_and_the_trained_network_two(folder: Path) -> None:
    rows = table(folder)
    epochs = [f"seed0-train300-epoch{epoch}of3" for epoch in range(3)]
    assert [row["kernel"] for row in rows] == [*epochs, "trained", "trained, again"]
    assert float(rows[0]["mean_loss"]) > 2.0  # ln 10 before training
    assert float(rows[0]["mean_loss"]) > float(rows[3]["mean_loss"])
    assert rows[0]["overlap"] == ""  # nothing came before
    assert rows[3]["last_overlap"] == ""  # itself
    for row in rows[1:]:
        assert float(row["gained"]) == pytest.approx(10 * (1 - float(row["overlap"])))
        assert float(row["lost"]) == pytest.approx(float(row["gained"]))
    with Image.open(folder / "f.checkpoints.png") as picture:
        assert picture.size == (935, 682)


def test_the_rows_are_kernels_at_the_trained_networks_settings(folder: Path) -> None:
    """Rebuilt by hand: the checkpoint of epoch 1, and the trained network with the next seed."""
    kernel, rows = lossk.open(folder / "f.lossk"), table(folder)
    task = fashion.make_task(data=folder, epochs=3, num_probe=40, required_accuracy=0.0, checkpoints=folder / "kept")
    sampler, passes = lossk.SGLD(**kernel.meta["sampler"]), lossk.Passes(**kernel.meta["passes"])

    def build(number: int) -> lossk.LossKernel:
        seed = int(np.random.SeedSequence(0, spawn_key=(number,)).generate_state(1)[0])  # each its own random numbers
        return lossk.build_kernel(
            task.model, task.samples, train=task.train, sampler=sampler, num_chains=2, num_draws=10, tile=16,
            passes=passes, seed=seed, progress=False,
        )  # fmt: skip

    again = compare_kernels(build(3), kernel)
    assert float(rows[4]["debiased_cka_r"]) == pytest.approx(again.debiased_cka_r, abs=1e-4)
    assert float(rows[4]["last_overlap"]) == pytest.approx(again.overlap, abs=0.01)
    task.model.load_state_dict(torch.load(task.checkpoints[1], weights_only=True))
    early = build(1)
    assert float(rows[1]["mean_loss"]) == pytest.approx(float(early.mean_loss.mean()), rel=1e-4)
    assert float(rows[1]["last_debiased_cka_r"]) == pytest.approx(
        compare_kernels(early, kernel).debiased_cka_r, abs=1e-4
    )


def test_a_second_run_trains_nothing_and_refuses_to_overwrite(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = {path.name: path.stat().st_mtime_ns for path in (folder / "kept").iterdir()}
    assert sorted(kept) == [f"seed0-train300-epoch{epoch}of3.pt" for epoch in range(4)]
    fashion.make_task(data=folder, epochs=3, num_probe=40, required_accuracy=0.0, checkpoints=folder / "kept")
    assert {path.name: path.stat().st_mtime_ns for path in (folder / "kept").iterdir()} == kept
    fresh = [str(folder / "g.lossk") if part == str(folder / "f.lossk") else part for part in arguments(folder)]
    (folder / "g.checkpoints.csv").write_text("mine")
    assert main(fresh) == 2
    assert "g.checkpoints.csv exists" in capsys.readouterr().err
    assert (folder / "g.checkpoints.csv").read_text() == "mine"


def test_a_folder_half_full_is_trained_again(tmp_path: Path) -> None:
    write_fashion(tmp_path)
    settings = {"data": tmp_path, "epochs": 3, "required_accuracy": 0.0, "checkpoints": tmp_path / "kept"}
    first = fashion.make_task(**settings)
    (tmp_path / "kept" / "seed0-train300-epoch1of3.pt").unlink()
    again = fashion.make_task(**settings)
    assert (tmp_path / "kept" / "seed0-train300-epoch1of3.pt").exists()
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))
    with pytest.raises(ValueError, match="checkpoint and checkpoints must not be given together"):
        fashion.make_task(**settings, checkpoint=tmp_path / "one.pt")
