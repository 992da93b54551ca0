"""What a config may run: where it comes from decides, before anything that it names is imported or called."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from lossk.cli import main as cli
from lossk.cli.config import load_config, parse_yaml
from lossk.recipes import RecipeTask, packaged_config, packaged_names, packaged_tasks
from planted import planted_kernel

FOUND = "named by a config that lies beside a store"
OWN = f"{__name__}:own_task"


def own_task(*, mark: str = "called") -> RecipeTask:
    Path(mark).touch()
    labels = torch.arange(9) % 3
    return RecipeTask(
        model=nn.Linear(1, 3), samples=(torch.zeros(9, 1), labels), labels=labels, class_names=["a", "b", "c"]
    )


def no_annotation(mark="called"):  # type: ignore[no-untyped-def]
    return own_task(mark=mark)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    planted_kernel(torch.arange(9) % 3).save(tmp_path / "x.lossk")
    Path("stranger.py").write_text("from pathlib import Path\nPath('imported').touch()\ndef make(**given): ...\n")
    return tmp_path


def write(task: str, **arguments: Any) -> None:
    Path("x.yaml").write_text(yaml.safe_dump({"task": task, "task_args": arguments, "out": "x.lossk", "picture": None}))


STRANGERS = [
    ("os:system", {"command": "touch called"}),
    ("subprocess:getoutput", {"cmd": "touch called"}),
    ("shutil:rmtree", {"path": "kept"}),
    ("timeit:timeit", {"stmt": "open('called', 'w')"}),
    ("builtins:exec", {"source": "open('called', 'w')"}),
    ("pathlib:Path.touch", {"self": "called"}),
    ("stranger:make", {}),
]


@pytest.mark.parametrize("command", ["hierarchy", "map"])
@pytest.mark.parametrize(("task", "arguments"), [*STRANGERS, (OWN, {})])
def test_a_config_beside_a_store_imports_and_calls_nothing(
    command: str, task: str, arguments: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "kept").mkdir()
    write(task, **arguments)
    before = sorted(path.name for path in folder.iterdir())
    assert cli.main([command, "x.lossk", "--labels", "config"]) == 2
    assert FOUND in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize(("task", "arguments"), STRANGERS)
@pytest.mark.parametrize(
    "command", [["run", "x.yaml", "--overwrite"], ["hierarchy", "x.lossk", "--labels", "config", "--trust"]]
)
def test_even_a_trusted_config_calls_nothing_but_what_makes_tasks(
    command: list[str], task: str, arguments: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "kept").mkdir()
    write(task, **arguments)
    assert cli.main(command) == 2
    told = capsys.readouterr().err
    assert "must return a lossk.recipes.RecipeTask" in told or "cannot be found" in told
    assert not Path("called").exists()
    assert all(Path(name).exists() for name in ("kept", "x.lossk"))


def test_with_trust_the_labels_are_those_of_the_task(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(OWN)
    assert cli.main(["hierarchy", "x.lossk", "--labels", "config", "--trust"]) == 0
    assert "3 classes, 9 live samples" in capsys.readouterr().out
    assert Path("called").exists()


@pytest.mark.parametrize("name", ["own_task", "no_annotation"])
def test_a_config_that_the_user_names_may_name_own_code(name: str, folder: Path) -> None:
    write(f"{__name__}:{name}", mark="mine")
    assert load_config("x.yaml").make_task().labels is not None
    assert Path("mine").exists()


def test_a_packaged_recipe_needs_no_trust_unless_it_writes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lossk.recipes.multitask.make_task", own_task)
    write("lossk.recipes.multitask:make_task")
    assert cli.main(["hierarchy", "x.lossk", "--labels", "config"]) == 0
    Path("called").unlink()
    write("lossk.recipes.multitask:make_task", checkpoint="~/.profile")
    assert cli.main(["hierarchy", "x.lossk", "--labels", "config"]) == 2
    assert "task_args.checkpoint = '~/.profile'" in capsys.readouterr().err
    assert not Path("called").exists()


def test_the_packaged_recipes_are_those_that_are_vouched_for() -> None:
    paths = [packaged_config(name) for name in packaged_names()]
    assert [parse_yaml(path.read_text())["task"] for path in paths if path is not None] == packaged_tasks()


BILLION = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [BILLION, "&a [*a]", "[" * 5000, "!!python/object/apply:os.system ['touch called']", "2020-99-99", "a: \0"],
    ids=["billion", "endless", "deep", "object", "date", "nul"],
)
@pytest.mark.parametrize("read", ["run", "taxonomy", "override"])
def test_hostile_yaml_is_one_line(text: str, read: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("hostile.yaml").write_text(text)
    calls: dict[str, list[str]] = {
        "run": ["run", "hostile.yaml"],
        "taxonomy": ["hierarchy", "x.lossk", "--labels", "labels.txt", "--taxonomy", "hostile.yaml"],
        "override": ["run", "digits", "--set", f"build.seed={text}"],
    }
    Path("labels.txt").write_text("0\n1\n2\n" * 3)
    assert cli.main(calls[read]) == 2
    told = capsys.readouterr().err
    assert "is not valid YAML" in told
    assert len(told.splitlines()) == 1
    assert not Path("called").exists()
