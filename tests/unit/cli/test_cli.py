"""The command line and run configs: exit codes, one-line errors, refusals before any work, replays."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import lossk
from lossk.cli import main as cli
from lossk.cli.config import RunConfig, load_config, parse_override, parse_yaml
from lossk.errors import DivergedError
from lossk.recipes import RecipeTask

Run = Callable[..., SimpleNamespace]


def make_task(*, num_samples: int = 30, mark: str | None = None) -> RecipeTask:
    """The task of this file's configs; `mark` is a file that shows that work has started."""
    if mark is not None:
        Path(mark).touch()
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(num_samples) % 3
    inputs = torch.randn(num_samples, 6, generator=rng) + 2 * nn.functional.one_hot(labels, 6)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Linear(6, 3)
    return RecipeTask(
        model=model,
        samples=(inputs, labels),
        labels=labels,
        images=inputs.sigmoid().reshape(-1, 2, 3),
        class_names=["a", "b", "c"],
        held_out=torch.arange(num_samples) >= 20,
        held_out_accuracy=0.5,
        notes="planted classes: three",
    )


def make_no_task() -> str:
    return "not a task"


CONFIG = {
    "task": f"{__name__}:make_task",
    "task_args": {},
    "build": {"num_chains": 2, "num_draws": 8, "tile": 16, "backend": "torch"},
    "sampler": {"lr": 1e-3, "localization": 10.0, "num_burnin_steps": 3, "num_steps_bw_draws": 2, "batch_size": 8},
    "out": "tiny.lossk",
    "picture": None,
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Call the command line in an empty folder; the config there is tiny.yaml unless `config` changes it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def call(*arguments: str, **config: Any) -> SimpleNamespace:
        Path("mine.yaml").write_text(yaml.safe_dump({**CONFIG, **config}))
        status = cli.main(arguments)
        printed = capsys.readouterr()
        return SimpleNamespace(status=status, out=printed.out, err=printed.err)

    return call


def error_of(result: SimpleNamespace) -> str:
    """The one line of a user's error."""
    assert result.status == 2, result.out + result.err
    assert result.err.startswith("lossk: ")
    assert result.err.count("\n") == 1, result.err
    assert "Traceback" not in result.err
    return result.err


# -- running ----------------------------------------------------------------------------------------------------------


def test_run_writes_the_store_and_a_config_that_replays_it(run: Run, assert_same_kernel: Callable) -> None:
    first = run("run", "mine.yaml")
    assert first.status == 0, first.err
    for expected in ("planted classes: three", "held-out accuracy 50.00%", "LLC", "R-hat", "same class", "chance",
                     "raw pixels", "noise floor", "Largest self-covariance", "wrote tiny.lossk"):  # fmt: skip
        assert expected in first.out
    assert first.out.count("sample  ") == 5
    written = load_config("tiny.yaml")
    assert written.passes == lossk.Passes(fused_head=False, overlap=False).to_dict()  # a short run's
    assert dataclasses.replace(written, passes=None) == load_config("mine.yaml")
    replay = run("run", "tiny.yaml", "--out", "again.lossk")
    assert replay.status == 0, replay.err
    assert_same_kernel(lossk.open("tiny.lossk"), lossk.open("again.lossk"))


def test_the_picture_moves_with_out(run: Run) -> None:
    pytest.importorskip("matplotlib")
    result = run("run", "mine.yaml", "--out", "new/other.lossk", picture="tiny.png")
    assert result.status == 0, result.err
    kinds = sorted(path.name.partition(".")[2] for path in Path("new").iterdir())
    assert kinds == ["lossk", "png", "samples.npz", "yaml"]
    assert not Path("tiny.png").exists()
    assert Path("new/other.png").stat().st_size > 10_000


def test_set_changes_the_config(run: Run) -> None:
    result = run("run", "mine.yaml", "--set", "build.num_draws=5", "--set", "sampler.lr=2e-3")
    assert result.status == 0, result.err
    kernel = lossk.open("tiny.lossk")
    assert kernel.num_draws == 5
    assert kernel.meta["sampler"]["lr"] == 2e-3
    assert load_config("tiny.yaml").build["num_draws"] == 5


def test_threads_are_set_for_the_run_and_put_back(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = torch.get_num_threads(), []
    monkeypatch.setattr(RunConfig, "make_task", lambda self: seen.append(torch.get_num_threads()) or make_task())
    assert run("run", "mine.yaml", threads=before + 1).status == 0
    assert seen == [before + 1]
    assert torch.get_num_threads() == before


def test_own_modules_in_the_current_folder_are_found(run: Run) -> None:
    Path("my_experiment.py").write_text(f"from {__name__} import make_task as anything\n")
    try:
        assert run("run", "mine.yaml", task="my_experiment:anything").status == 0
    finally:
        sys.modules.pop("my_experiment", None)


def test_the_config_that_is_the_replay_is_left_alone(run: Run) -> None:
    Path("tiny.yaml").write_text("# my own words\n" + yaml.safe_dump(CONFIG))
    assert run("run", "tiny.yaml").status == 0
    assert Path("tiny.yaml").read_text().startswith("# my own words")
    changed = run("run", "tiny.yaml", "--overwrite", "--set", "build.num_draws=5")
    assert "would be written over 'tiny.yaml' itself" in error_of(changed)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("taken", ["tiny.lossk", "tiny.yaml", "tiny.png"])
def test_nothing_is_overwritten_and_no_work_is_done_first(run: Run, taken: str) -> None:
    Path(taken).write_text("precious")
    result = run("run", "mine.yaml", picture="tiny.png", task_args={"mark": "started"})
    assert taken in error_of(result)
    assert "--overwrite" in result.err
    assert Path(taken).read_text() == "precious"
    assert not Path("started").exists()


def test_overwrite_replaces_a_store_and_nothing_else(run: Run) -> None:
    assert run("run", "mine.yaml").status == 0
    assert run("run", "mine.yaml", "--overwrite", "--set", "build.num_draws=6").status == 0
    assert lossk.open("tiny.lossk").num_draws == 6
    Path("folder.lossk").mkdir()
    Path("folder.lossk/thesis.tex").write_text("precious")
    result = run("run", "mine.yaml", "--overwrite", "--out", "folder.lossk", task_args={"mark": "started"})
    assert "is not a .lossk store" in error_of(result)
    assert Path("folder.lossk/thesis.tex").exists()
    assert not Path("started").exists()


def test_overwrite_does_not_delete_a_store_that_is_being_written(run: Run) -> None:
    import fcntl

    assert run("run", "mine.yaml").status == 0
    with Path("tiny.lossk/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "is being written by another process" in error_of(run("run", "mine.yaml", "--overwrite"))
    assert lossk.open("tiny.lossk").num_draws == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pictures": "x.png"}, "config has no key 'pictures'; did you mean 'picture'?"),
        ({"build": {"num_draw": 5}}, "build has no key 'num_draw'; did you mean 'num_draws'?"),
        ({"sampler": {"learning_rate": 1e-3}}, "sampler has no key 'learning_rate'"),
        ({"task_args": {"num_sample": 9}}, "task_args has no key 'num_sample'; did you mean 'num_samples'?"),
        ({"sampler": {"lr": -1.0}}, "lr must be finite and greater than 0, got -1.0"),
        ({"build": [1, 2]}, "build must hold a mapping, got list"),
        ({"task": "nothing.here:make_task"}, "No module named 'nothing'"),
        ({"task": f"{__name__}:absent"}, "has no attribute 'absent'"),
        ({"task": f"{__name__}:make_no_task"}, "must return a lossk.recipes.RecipeTask, got str"),
        ({"task": "no_colon"}, "task must be 'module:function'"),
        ({"task": None}, "must name its task"),
        ({"out": "tiny.zarr"}, "out must end in .lossk, got 'tiny.zarr'"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"build": {**CONFIG["build"], "tile": 100}}, "tile must be a positive multiple of 16, got 100"),
    ],
)
def test_a_bad_config_is_one_line_and_leaves_no_store(run: Run, change: dict[str, Any], message: str) -> None:
    assert message in error_of(run("run", "mine.yaml", **change))
    assert [path.name for path in Path().iterdir()] == ["mine.yaml"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "absent.yaml"), "there is no config file or recipe 'absent.yaml'; recipes: digits, fashion"),
        (("run", "mine.yaml", "--set", "num_draws"), "--set needs key=value, got 'num_draws'"),
        (("run", "mine.yaml", "--set", "build.num_draws=[1"), "is not valid YAML"),
        (("run", "mine.yaml", "--set", "out.name=1"), "out holds no mapping"),
        (("run", "fashion", "--out", "f.lossk", "--set", "task_args.data=."), "apt-get install dataset-fashion-mnist"),
        (("info", "absent.lossk"), "there is no store at 'absent.lossk'"),
        (("info", "."), "is not a .lossk store"),
    ],
)
def test_errors_are_one_line_and_exit_2(run: Run, arguments: tuple[str, ...], message: str) -> None:
    assert message in error_of(run(*arguments))


def test_broken_yaml_is_one_line(run: Run) -> None:
    Path("broken.yaml").write_text("task: [1\nout: {")
    assert "broken.yaml is not valid YAML" in error_of(run("run", "broken.yaml"))


def test_debug_shows_the_traceback(run: Run) -> None:
    with pytest.raises(lossk.StoreError, match="there is no store"):
        run("--debug", "info", "absent.lossk")


def test_missing_plotting_is_said_before_the_work(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    demo = error_of(run("demo"))
    assert 'needs scikit-learn and matplotlib: pip install "lossk[demo]"' in demo
    error_of(run("run", "mine.yaml", picture="tiny.png", task_args={"mark": "started"}))
    assert not Path("started").exists()


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "lossk: interrupted\n"),
        (DivergedError("chain 1 diverged at step 7"), 2, "lossk: chain 1 diverged at step 7\n"),
    ],
)
def test_an_interrupted_or_diverged_run(
    run: Run, monkeypatch: pytest.MonkeyPatch, raised: BaseException, status: int, said: str
) -> None:
    def stop(*arguments: Any, **settings: Any) -> None:
        raise raised

    monkeypatch.setattr(lossk, "build_kernel", stop)
    result = run("run", "mine.yaml")
    assert (result.status, result.err) == (status, said)


@pytest.mark.parametrize("arguments", [(), ("fly",), ("run",), ("run", "digits", "--overwrite", "--resume")])
def test_bad_usage_exits_2(run: Run, arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2


# -- an interrupted run -----------------------------------------------------------------------------------------------


def test_an_unfinished_store_says_how_far_it_got_and_resumes(
    run: Run, monkeypatch: pytest.MonkeyPatch, assert_same_kernel: Callable
) -> None:
    build = {**CONFIG["build"], "panel": 4}
    assert run("run", "mine.yaml", "--out", "whole.lossk", build=build).status == 0

    from lossk.accumulate.runlog import RunLog

    commit = RunLog.commit

    def stop_at_third(self: RunLog, new: Any, **how: Any) -> None:
        if len(self.commits) == 2:
            raise KeyboardInterrupt
        commit(self, new, **how)

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "commit", stop_at_third)
        assert run("run", "mine.yaml", build=build).status == 130
    told = run("info", "tiny.lossk")
    assert told.status == 0
    assert "unfinished: 8 of 16 draws are saved" in told.out
    assert "lossk run tiny.yaml --resume" in told.out
    plain = json.loads(run("info", "tiny.lossk", "--json").out)
    assert plain["complete"] is False
    assert "8 of 16" in plain["progress"]

    assert "--overwrite" in error_of(run("run", "tiny.yaml"))
    resumed = run("run", "tiny.yaml", "--resume")
    assert resumed.status == 0, resumed.err
    assert_same_kernel(lossk.open("tiny.lossk"), lossk.open("whole.lossk"))


# -- telling ----------------------------------------------------------------------------------------------------------


def test_info_describes_a_store(run: Run) -> None:
    assert run("run", "mine.yaml").status == 0
    told = run("info", "tiny.lossk")
    for expected in ("30 samples", "2 chains x 8 draws", "float32", "complete", "LLC", "verdict", "lr", "gradient"):
        assert expected in told.out
    plain = json.loads(run("info", "tiny.lossk", "--json").out)
    assert plain["complete"] is True
    assert plain["num_samples"] == 30
    assert plain["sampler"]["lr"] == 1e-3
    assert plain["bytes"] > 0


def test_doctor_names_every_backend(run: Run) -> None:
    told = run("doctor")
    assert told.status == 0
    for expected in ("python", "torch", "backend cpp", "backend torch  ok", "triton", "CUDA"):
        assert expected in told.out


def test_module_and_version() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "lossk", "--version"], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout == f"lossk {lossk.__version__}\n"


# -- configs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits", "fashion"])
def test_packaged_configs_are_valid_and_survive_a_round_trip(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    path = tmp_path / "copy.yaml"
    path.write_text(config.to_yaml())
    assert load_config(str(path)) == config
    assert config.build["num_chains"] == 4


def test_numbers_in_yaml() -> None:
    assert parse_yaml("{a: 1e-4, b: 2E+3, c: 1.5e-06, d: .5e1}") == {"a": 1e-4, "b": 2e3, "c": 1.5e-6, "d": 5.0}
    assert parse_yaml("[auto, '1e-4', e5, 12, null]") == ["auto", "1e-4", "e5", 12, None]
    assert parse_override("sampler.lr=3e-5") == ("sampler.lr", 3e-5)


def test_yaml_runs_no_code(run: Run) -> None:
    Path("evil.yaml").write_text("task: !!python/object/apply:os.system ['touch pwned']\nout: x.lossk\n")
    error_of(run("run", "evil.yaml"))
    assert not Path("pwned").exists()
