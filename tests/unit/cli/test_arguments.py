"""Every argument says what it is, with an example; commands print what they found; the command line starts at once."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import lossk
from lossk.analysis import significant_neighbors
from lossk.analysis.attribution import ORDERS
from lossk.cli.arguments import recipe_names
from lossk.cli.completion import commands_of, script
from lossk.cli.grid import GridSettings
from lossk.cli.main import build_parser, main
from lossk.recipes import packaged_names
from lossk.report.samples import Samples, samples_path, write_samples
from planted import planted_kernel

N = 30
WORDS = ["cat", "dog", "owl"]
LABELS = [WORDS[i % 3] for i in range(N)]
COMMANDS = commands_of(build_parser())
ARGUMENTS = [
    (name, action)
    for name, command in COMMANDS.items()
    for action in command._actions
    if not isinstance(action, argparse._HelpAction)
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store without names, and beside it `named.lossk` and the classes in a file."""
    folder = tmp_path_factory.mktemp("named")
    kernel = planted_kernel(torch.arange(N) % 3)
    kernel.save(folder / "k.lossk")
    kernel.named(ids=[f"img{i}" for i in range(N)], labels=LABELS).save(folder / "named.lossk")
    (folder / "labels.csv").write_text("\n".join(LABELS))
    return folder / "k.lossk"


@pytest.mark.parametrize(("name", "action"), ARGUMENTS, ids=lambda part: getattr(part, "dest", part))
def test_every_argument_has_help_with_an_example(name: str, action: argparse.Action) -> None:
    assert action.help
    takes_a_value = action.nargs != 0
    assert not takes_a_value or action.choices or "e.g. " in action.help.lower(), f"{name} {action.dest}"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_an_example_that_parses(name: str) -> None:
    epilog = COMMANDS[name].epilog
    assert epilog is not None
    words = epilog.removeprefix("example: ").removeprefix('eval "$(').removesuffix(')"').split()
    assert words[:2] == ["lossk", name]
    options = build_parser().parse_args([word for word in words[1:] if word not in ("--images", "images.npy")])
    assert callable(options.run)


def test_the_command_line_knows_what_the_library_says() -> None:
    assert recipe_names() == packaged_names()
    tune, defaults = COMMANDS["tune"], GridSettings()
    for name in ("probe", "num_chains", "num_draws", "max_steps"):
        assert tune.get_default(name) == getattr(defaults, name)
    (by,) = (action for action in COMMANDS["attribute"]._actions if action.dest == "by")
    assert by.choices == ORDERS


def test_help_imports_no_torch() -> None:
    code = "import sys; from lossk.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'numpy', 'scipy'} & set(sys.modules), 'slow'"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)


def test_info_imports_little(store: Path) -> None:
    code = f"import sys; from lossk.cli.main import main\nassert main(['info', {str(store)!r}]) == 0\n"
    code += "assert not {'scipy.special', 'scipy.sparse', 'zarr', 'arviz_stats', 'sklearn', 'matplotlib', 'pandas',"
    code += " 'lossk.samplers.sgld'} & set(sys.modules), sorted(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)


# --- labels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["--labels", "store", "beside"])
@pytest.mark.parametrize("command", ["neighbors", "hierarchy", "attribute"])
def test_labels_mean_one_thing(
    command: str, how: str, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file, what the store keeps, and what `lossk run` saved beside it, give the same classes."""
    path = store
    if how == "store":
        path = store.with_name("named.lossk")
    elif how == "beside":
        path = tmp_path / "k.lossk"
        shutil.copytree(store, path)
        numbers = np.array([WORDS.index(word) for word in LABELS])
        write_samples(Samples(labels=numbers, class_names=WORDS).checked(N), samples_path(path))
    arguments = ["--labels", str(store.with_name("labels.csv"))] if how == "--labels" else []
    arguments += ["--query", "0,1"] if command == "attribute" else []
    assert main([command, str(path), *arguments]) == 0
    text = capsys.readouterr().out
    name = "img3" if how == "store" else "3"
    expected = {
        "neighbors": f"{name} (cat)",
        "hierarchy": "cat and",
        "attribute": "query 0 [img0 (cat)]" if how == "store" else "query 0 [0 (cat)]",
    }
    assert expected[command] in text


def test_hierarchy_without_labels_says_what_to_give(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hierarchy", str(store)]) == 2
    assert "--labels must be given" in capsys.readouterr().err


def test_neighbors_are_printed(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["neighbors", str(store), "--k", "2", "--show", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = significant_neighbors(lossk.open(store), 2)
    at = next(i for i, line in enumerate(lines) if line.split()[:1] == ["sample"])
    for row, line in enumerate(lines[at + 1 : at + 5]):
        words = line.split()
        assert words[0] == str(row)
        assert words[1] == f"{float(found.noise_floor[row]):.3f}"
        assert words[2] == str(int(found.index[row, 0]))
        assert words[3].rstrip(",*") == f"{float(found.correlation[row, 0]):.3f}"
    assert lines[at + 5].startswith("... 26 more samples")


def test_the_closest_classes_come_first(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hierarchy", str(store.with_name("named.lossk"))]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  closest")]
    values = [float(line[1]) for line in lines]
    assert len(values) == 3
    assert values == sorted(values, reverse=True)


def test_info_is_for_people(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(store.with_name("named.lossk"))]) == 0
    text = capsys.readouterr().out
    assert "ids img0, ..., 3 classes: cat, dog, owl" in text
    assert "{" not in text
    assert "None" not in text


# --- completion --------------------------------------------------------------------------------------------------


def completed(words: list[str], folder: Path) -> list[str]:
    """What bash offers for the last word."""
    (folder / "lossk.sh").write_text(script(build_parser(), "bash"))
    line = " ".join(f"'{word}'" for word in words)
    code = f'source ./lossk.sh; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _lossk; echo "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", code], cwd=folder, check=True, capture_output=True, text=True, timeout=60)
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes(tmp_path: Path) -> None:
    assert completed(["lossk", "ne"], tmp_path) == ["neighbors"]
    assert set(completed(["lossk", ""], tmp_path)) == set(COMMANDS)
    assert completed(["lossk", "attribute", "--b"], tmp_path) == ["--by"]
    assert completed(["lossk", "attribute", "--by", "i"], tmp_path) == ["influence"]
    assert completed(["lossk", "completion", "z"], tmp_path) == ["zsh"]
    assert completed(["lossk", "info", "some"], tmp_path) == []


def test_zsh_takes_the_same_script() -> None:
    assert script(build_parser(), "zsh").endswith(script(build_parser(), "bash"))
    assert "bashcompinit" in script(build_parser(), "zsh")
