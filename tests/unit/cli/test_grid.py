"""`lossk tune`: cells, resuming, jobs, the recommendation and the picture."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from lossk.cli import grid_jobs
from lossk.cli import main as cli
from lossk.cli import tune as cli_tune
from lossk.cli.grid import GridSettings, parse_values
from lossk.cli.grid_cell import choose_probe, grid_data
from lossk.disk.locks import Lock
from lossk.recipes import RecipeTask
from lossk.report.grid_picture import COLORS, draw_grid

pytest.importorskip("matplotlib")
Tune = Callable[..., SimpleNamespace]
QUICK = ("--num-draws", "4", "--num-chains", "2", "--probe", "12")


def make_task(*, num_samples: int = 30, log: str | None = None, broken: bool = False) -> RecipeTask:
    """Three planted classes; every call adds a letter to the file `log`."""
    if log is not None:
        with Path(log).open("a") as file:
            file.write("x")
    if broken and Path("began").exists():
        raise RuntimeError("the data is gone")
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(num_samples) % 3
    inputs = torch.randn(num_samples, 6, generator=rng) + 2 * nn.functional.one_hot(labels, 6)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Linear(6, 3)
    return RecipeTask(model=model, samples=(inputs, labels), labels=labels, class_names=list("abc"), notes="planted")


CONFIG = {
    "task": f"{__name__}:make_task",
    "build": {"backend": "torch"},
    "sampler": {"lr": 1e-3, "localization": 10.0, "num_burnin_steps": 3, "num_steps_bw_draws": 2, "batch_size": 8},
    "out": "tiny.lossk",
    "picture": None,
}
CELLS = 15
FIVE = ("--n-beta", "1x")


@pytest.fixture
def tune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tune:
    """Call `lossk tune mine.yaml` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def call(*arguments: str, **config: Any) -> SimpleNamespace:
        Path("mine.yaml").write_text(yaml.safe_dump({**CONFIG, **config}))
        status = cli.main(("tune", "mine.yaml", *QUICK, *arguments))
        printed = capsys.readouterr()
        return SimpleNamespace(status=status, out=printed.out, err=printed.err)

    return call


def error_of(result: SimpleNamespace) -> str:
    assert result.status == 2, result.out + result.err
    last = result.err.splitlines()[-1]
    assert last.startswith("lossk: ")
    assert "Traceback" not in result.err
    return last


def cells_of(folder: str = "tiny.tune") -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(Path(folder).glob("n_beta=*.json"))}


def numbers_of(cells: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Without what a clock says."""
    timed = ("seconds", "seconds_taken")
    return {name: {key: v for key, v in cell.items() if key not in timed} for name, cell in cells.items()}


# -- a grid -----------------------------------------------------------------------------------------------------------


def test_a_grid_completes_and_tells(tune: Tune) -> None:
    result = tune()
    assert result.status == 0, result.err
    cells = cells_of()
    assert len(cells) == CELLS
    assert {cell["sampler"]["localization"] for cell in cells.values()} == {1.0, 3.162, 10.0, 31.62, 100.0}
    assert sorted({round(c["sampler"]["n_beta"], 3) for c in cells.values()}) == [0.882, 8.82, 88.2]  # 30 / ln 30
    for cell in cells.values():
        assert cell["verdict"] in COLORS
        for key in ("rhat", "ess", "llc", "rise", "gradient_noise_ratio", "discretisation", "noise_floor", "purity"):
            assert isinstance(cell[key], float), key
        assert cell["sampler"]["lr"] == 1e-3  # the config's
        assert cell["rise_bound"] == pytest.approx(21 / 2 / cell["sampler"]["n_beta"])  # 6 x 3 weights and 3 biases
        assert cell["llc"] == pytest.approx(cell["sampler"]["n_beta"] * cell["rise"])
    table = [line for line in result.out.splitlines() if line.split()[:1] and line.split()[0] in ("0.882", "88.2")]
    assert len(table) == 10
    assert f"{CELLS} cells of 2 chains x 4 draws on 12 samples" in result.out
    assert "about" in result.out
    assert "recommended" in result.out
    assert "wrote tiny.tune/grid.png" in result.out
    assert Path("tiny.tune/grid.png").stat().st_size > 10_000


def test_two_jobs_give_what_one_gives(tune: Tune) -> None:
    lists = ("--n-beta", "1x", "20", "--localization", "5", "1x")
    assert tune(*lists, "--out", "one", task_args={"log": "made"}).status == 0
    assert Path("made").read_text() == "xx"  # for the plan, and for the cells
    result = tune(*lists, "--out", "two", "--jobs", "2", task_args={"log": "made"})
    assert result.status == 0, result.err
    assert len(Path("made").read_text()) <= 2 + 3
    assert len(cells_of("one")) == 4
    assert numbers_of(cells_of("one")) == numbers_of(cells_of("two"))


def test_automatic_settings_differ_from_cell_to_cell_and_stay_within_max_steps(tune: Tune) -> None:
    result = tune("--max-steps", "40", sampler={"batch_size": 8})
    assert result.status == 0, result.err
    cells = cells_of()
    assert len({cell["sampler"]["lr"] for cell in cells.values()}) > 3
    assert all(cell["steps"] <= 40 for cell in cells.values())
    cut = [cell for cell in cells.values() if cell["steps_wanted"] > 40]
    assert f"{len(cut)} cells want more than 40 steps" in result.out
    assert any(cell["verdict"] == "not burned in" for cell in cut)


def test_a_diverging_cell_is_a_verdict(tune: Tune) -> None:
    result = tune("--n-beta", "1x", "1e7", "--localization", "1x")
    assert result.status == 0, result.err
    verdicts = {cell["sampler"]["n_beta"]: cell["verdict"] for cell in cells_of().values()}
    assert verdicts[1e7] == "diverged"
    assert verdicts[8.82] != "diverged"
    assert "(1e+07, 10) diverged: chain 0 diverged at step" in result.out


# -- resuming ---------------------------------------------------------------------------------------------------------


def test_resuming_skips_finished_cells_and_redoes_torn_ones(tune: Tune, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tune(*FIVE).status == 0
    paths = sorted(Path("tiny.tune").glob("n_beta=*.json"))
    whole = cells_of()
    text = paths[0].read_text()
    paths[0].write_text(text[: len(text) // 2])
    paths[1].write_text("{}")
    paths[2].write_bytes(b"\xff\xfe")
    paths[3].unlink()
    ran, run_cell = [], grid_jobs.run_cell
    monkeypatch.setattr(grid_jobs, "run_cell", lambda cell, *rest: ran.append(cell.name) or run_cell(cell, *rest))
    assert "tiny.tune exists; pass --resume" in error_of(tune(*FIVE))
    result = tune(*FIVE, "--resume")
    assert result.status == 0, result.err
    assert sorted(ran) == sorted(path.stem for path in paths[:4])
    assert "1 already finished" in result.out
    assert numbers_of(cells_of()) == numbers_of(whole)


def test_a_finished_grid_needs_no_task_and_can_be_extended(tune: Tune) -> None:
    log = {"log": "made"}
    assert tune("--n-beta", "1x", "--localization", "1x", task_args=log).status == 0
    assert tune("--n-beta", "1x", "--localization", "1x", "--resume", task_args=log).status == 0
    assert Path("made").read_text() == "xx"
    before = Path("tiny.tune/n_beta=8.82 localization=10.json").stat().st_mtime_ns
    assert tune("--n-beta", "1x", "2x", "--localization", "1x", "--resume", task_args=log).status == 0
    assert len(cells_of()) == 2
    assert Path("tiny.tune/n_beta=8.82 localization=10.json").stat().st_mtime_ns == before


def test_another_config_is_refused_with_the_difference(tune: Tune) -> None:
    small = ("--n-beta", "1x", "--localization", "1x")
    assert tune(*small).status == 0
    changed = error_of(tune(*small, "--resume", "--set", "sampler.lr=2e-3"))
    assert "'lr': 0.001" in changed
    assert "'lr': 0.002" in changed
    assert "num_draws: saved 4, now 5" in error_of(tune(*small, "--resume", "--num-draws", "5"))
    assert tune(*small, "--overwrite", "--num-draws", "5").status == 0
    assert next(iter(cells_of().values()))["request"]["num_draws"] == 5


def test_an_interrupted_grid_keeps_what_is_finished(tune: Tune, monkeypatch: pytest.MonkeyPatch) -> None:
    run_cell, ran = grid_jobs.run_cell, []

    def stop_at_third(*arguments: Any) -> dict[str, Any]:
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(1)
        return run_cell(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(grid_jobs, "run_cell", stop_at_third)
        result = tune(*FIVE)
    assert result.status == 130
    assert "2 of 5 cells are finished" in result.out
    assert len(cells_of()) == 2
    assert tune(*FIVE, "--resume").status == 0
    assert len(cells_of()) == 5


def test_a_folder_in_use_or_of_something_else_is_left_alone(tune: Tune) -> None:
    small = ("--n-beta", "1x", "--localization", "1x")
    Path("thesis").mkdir()
    Path("thesis/thesis.tex").write_text("precious")
    assert "is not a folder of lossk tune" in error_of(tune(*small, "--overwrite", "--out", "thesis"))
    assert [path.name for path in Path("thesis").iterdir()] == ["thesis.tex"]
    assert tune(*small).status == 0
    lock = Lock(Path("tiny.tune"))
    for flag in ("--overwrite", "--resume"):
        assert "is being written by another process" in error_of(tune(*small, flag))
    lock.release()
    assert len(cells_of()) == 1
    assert tune(*small, "--resume").status == 0
    assert not list(Path("tiny.tune").glob(".*"))


def test_jobs_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    """Killed outright, it leaves nobody who computes on."""
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**CONFIG, "task": "slow:make_task"}))
    (tmp_path / "slow.py").write_text(SLOW)
    command = [sys.executable, "-m", "lossk", "tune", "mine.yaml", *QUICK, "--n-beta", "1x", "2x", "--jobs", "2"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parent)])}
    parent = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        pids = [_await(tmp_path / f"job{i}") for i in range(2)]
    finally:
        parent.kill()
        parent.wait()
    deadline = time.monotonic() + 20
    while any(_lives(pid) for pid in pids):
        assert time.monotonic() < deadline, "a job outlived its parent by 20 seconds"
        time.sleep(0.05)


SLOW = """
import multiprocessing, os, pathlib, time
from lossk.recipes import RecipeTask
from test_grid import make_task as make
def make_task() -> RecipeTask:
    if multiprocessing.parent_process() is not None:
        for i in range(2):
            try:
                os.close(os.open(f"taken{i}", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                continue
            pathlib.Path(f"job{i}.tmp").write_text(str(os.getpid()))
            os.rename(f"job{i}.tmp", f"job{i}")
            break
        time.sleep(60)
    return make()
"""


def _await(path: Path) -> int:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path.name}"
        time.sleep(0.05)
    return int(path.read_text())


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_goes_wrong_in_a_job_is_told(tune: Tune, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = cli_tune.plan_grid

    def plan_then_break(*arguments: Any) -> dict[str, Any]:
        grid = plan(*arguments)
        Path("began").touch()
        return grid

    monkeypatch.setattr(cli_tune, "plan_grid", plan_then_break)
    result = tune("--n-beta", "1x", "2x", "--localization", "1x", "--jobs", "2", task_args={"broken": True})
    assert "RuntimeError in a job: the data is gone" in error_of(result)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--jobs", "0"), "--jobs must be at least 1, got 0"),
        (("--n-beta", "-1"), "--n-beta must be numbers greater than 0, or multiples like 10x, got '-1'"),
        (("--n-beta", "big"), "got 'big'"),
        (("--n-beta", "nan"), "got 'nan'"),
        (("--localization", "0"), "--localization must be numbers greater than 0"),
        (("--localization", "2", "2.0"), "--localization must be different numbers"),
        (("--num-draws", "3"), "num_draws must be at least 4, got 3"),
        (("--num-chains", "1"), "num_chains must be at least 2, got 1"),
        (("--probe", "1"), "probe must be at least 2, got 1"),
        (("--max-steps", "7"), "max_steps must be at least 8, got 7"),
        (("--set", "sampler.lrr=1"), "sampler has no key 'lrr'"),
        (("--set", "task=nothing.here:make"), "No module named 'nothing'"),
        (("--set", "sampler.localization=0"), "localization must be greater than 0 or 'auto'"),
    ],
)
def test_bad_arguments_are_named_and_leave_nothing(tune: Tune, arguments: tuple[str, ...], message: str) -> None:
    assert message in error_of(tune(*arguments))
    assert [path.name for path in Path().iterdir()] == ["mine.yaml"]


def test_values() -> None:
    assert parse_values("--n-beta", ["30", "2x", "1e-1x"]) == [[30.0, False], [2.0, True], [0.1, True]]
    assert parse_values("--n-beta", None) is None
    assert GridSettings().max_steps == 5000


# -- parts ------------------------------------------------------------------------------------------------------------


def test_the_probe_has_the_same_share_of_every_class() -> None:
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)[
        torch.randperm(100, generator=torch.Generator().manual_seed(0))
    ]
    index = choose_probe(100, labels, 20)
    assert len(index.unique()) == 20
    assert torch.equal(index, index.sort().values)
    counts = torch.bincount(labels[index]).tolist()
    assert all(abs(count - truth) <= 1 for count, truth in zip(counts, (12, 6, 2), strict=True))
    assert choose_probe(100, None, 3).tolist() == [0, 50, 99]
    assert choose_probe(5, None, 20).tolist() == [0, 1, 2, 3, 4]


def test_a_thinned_probe_does_not_thin_the_training_data() -> None:
    task = make_task()
    probe, labels, train = grid_data(task, 12)
    assert labels is not None
    assert len(probe[0]) == len(labels) == 12
    assert torch.equal(probe[1], labels)
    assert len(train[0]) == 30


def cell(verdict: str, n_beta: float, localization: float, rise: float) -> dict[str, Any]:
    return {
        "sampler": {"n_beta": n_beta, "localization": localization, "lr": 1e-4, "num_burnin_steps": 5,
                    "num_steps_bw_draws": 3},
        "verdict": verdict, "advice": "change this", "rhat": 1.02, "ess": 120.0, "llc": 12.34, "llc_se": float("nan"),
        "rise": rise, "purity": None, "seconds_taken": 1.0,
    }  # fmt: skip


def test_the_recommended_cell_is_the_least_local_good_one() -> None:
    cells = [cell("good", 1, 1, 0.9), cell("good", 1, 10, 0.3), cell("good", 1, 100, 0.1),
             cell("chains disagree", 10, 1, 0.4)]  # fmt: skip
    best, reason = cli_tune.recommend(cells)
    assert best is cells[1]
    assert "of the 2 good cells" in reason
    assert "edge" not in reason
    assert "edge" in cli_tune.recommend(cells[1:3])[1]
    best, reason = cli_tune.recommend(cells[3:])
    assert best is None
    assert "no cell is good" in reason
    assert "more than 0.5 nats" in cli_tune.recommend(cells[:1])[1]


def test_the_picture_shows_every_cell_in_its_color(tmp_path: Path) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    cells = [cell(verdict, 10.0 ** (i % 3), 10.0 ** (i // 3), 0.1) for i, verdict in enumerate(COLORS)]
    cells[-1] = {key: cells[-1][key] for key in ("sampler", "verdict", "advice", "seconds_taken")}  # diverged
    path = tmp_path / "grid.png"
    draw_grid(cells, path, title="Title " * 40, subtitles=["one", "two"], middle={"n_beta": 10.0, "localization": 10.0},
              recommended=cells[0])  # fmt: skip
    shown = imread(path)[..., :3]
    for verdict, color in COLORS.items():
        share = (abs(shown - torch.tensor(to_rgb(color)).numpy()).max(axis=2) < 0.01).mean()
        assert share > 0.03, verdict
    assert (shown[:4] == 1).all()
    assert (shown[-4:] == 1).all()
    assert (shown[:, :4] == 1).all()
    assert (shown[:, -4:] == 1).all()  # nothing is cut off
