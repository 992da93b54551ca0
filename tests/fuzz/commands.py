"""The command line's options, and the keys of a config: texts where texts are read, and any value where YAML is."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lossk.cli.config import RunConfig
from lossk.cli.grid import GridSettings
from lossk.cli.main import main
from lossk.errors import LosskError

from . import rules as r
from .judge import Entry
from .table_core import BACKEND, CENTERING, PRECISION, SEED, STORED
from .world import NAMES, World

# --set names the key of the config that it sets.
KEYS = ("config", "tile", "lr", "build", "task_args")

TEXTS = (
    "", " ", "no", "True", "null", "0", "-1", "1", "5", "7", "8", "1.5", "-0.5", "nan", "inf", "1e30", "1e-400",
    str(10**12), "9" * 400, "9" * 5000, "[1, 2]", "{a: 1}", "a\0b", "x" * 10_000, "nowhere/x", "nowhere/x.csv", ".",
    "x.txt", "3,99", "3-1", "0-2", "train", "--", "é\n", "1_000", "0x10", "5x", "=", "a=", "key=1", "build.tile=17",
    "sampler.lr=no", "build=5", "task_args.x=1", "\ud800",
)  # fmt: skip


class Refused(LosskError):
    """A command that ended with status 2 and one line."""


def run(*arguments: str) -> None:
    """The command line in this process.

    Raises:
        Refused: with the line that it printed.
        AssertionError: it printed more than a line, or a traceback.
    """
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            status = main(arguments)
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
    if status == 2:
        lines = said.getvalue().strip().splitlines()
        assert len(lines) == 1, f"{len(lines)} lines: {lines[:3]}"
        raise Refused(lines[0])
    assert "Traceback" not in said.getvalue()


def _is(kind: Callable[[str], Any], least: float, most: float) -> r.Rule:
    def rule(text: Any) -> bool:
        try:
            return bool(least <= kind(text) <= most)
        except ValueError:
            return False

    return rule


def _suffix(*suffixes: str) -> r.Rule:
    return lambda text: r.path(text) and Path(text).suffix in suffixes


COUNT = 2**31 - 1


def options(w: World) -> list[Entry]:
    """An entry per command, whose parameters are its options; a valid call gives each of them a text."""
    store, labels = str(w.store), w.folder / "labels.npy"
    np.save(labels, w.labels.numpy())
    texts = w.folder / "texts.txt"
    texts.write_text("\n".join(NAMES * 2))
    positive, seed = _is(int, 1, COUNT), _is(int, 0, 2**32 - 1)
    there = {"store": _there, "--labels": _never, "--images": _never, "--texts": _never, "--taxonomy": _never}
    table, picture = _suffix(".csv", ".parquet"), _suffix(".csv", ".parquet", ".png")
    commands: list[tuple[str, dict[str, str], dict[str, r.Rule], tuple[str, ...]]] = [
        ("info", {"store": store}, there, ()),
        ("verify", {"store": store}, there, ()),
        ("neighbors", {"store": store, "--k": "2", "--rows": "1", "--out": ""},
         {**there, "--k": _is(int, 1, 7), "--rows": _is(int, -8, 7), "--out": table}, ()),
        ("map", {"store": store, "--dimensions": "2", "--num-neighbors": "3", "--min-dist": "0.1", "--seed": "0",
                 "--min-cluster-size": "2", "--labels": str(labels), "--out": ""},
         {**there, "--dimensions": _is(int, 1, 10), "--num-neighbors": _is(int, 2, COUNT), "--seed": seed,
          "--min-dist": _is(float, 0, 1), "--min-cluster-size": _is(int, 2, COUNT), "--out": picture},
         ("lossk.analysis.maps._umap",)),
        ("hierarchy", {"store": store, "--labels": str(labels), "--taxonomy": "", "--seed": "0", "--out": ""},
         {**there, "--seed": seed, "--out": picture}, ()),
        ("compare", {"a": store, "b": store, "--k": "2", "--out": ""},
         {"a": _there, "b": _there, "--k": _is(int, 1, 7), "--out": table}, ()),
        ("attribute", {"store": store, "--query": "query", "--train": "train", "--top": "2", "--by": "influence",
                       "--out": ""},
         {**there, "--query": _rows, "--train": _rows, "--top": positive, "--by": _never, "--out": table}, ()),
        ("export", {"store": store, "out": "fresh.zarr", "--format": "zarr"},
         {**there, "out": r.path, "--format": _never}, ()),
        ("report", {"store": store, "--out": "fresh.html", "--labels": str(labels), "--images": "",
                    "--texts": str(texts), "--title": "a", "--seed": "0"},
         {**there, "--out": r.path, "--title": r.text, "--seed": seed}, ("lossk.report.page.find",)),
        ("tune", {"config": "digits", "--out": "fresh.tune", "--n-beta": "1x", "--localization": "1x", "--jobs": "1",
                  "--probe": "64", "--num-chains": "2", "--num-draws": "4", "--max-steps": "5000", "--set": ""},
         {"config": _never, "--out": _folder, "--n-beta": _multiple, "--localization": _multiple,
          "--jobs": _is(int, 1, 1024), "--probe": _is(int, 2, COUNT), "--num-chains": _is(int, 2, COUNT),
          "--num-draws": _is(int, 4, COUNT), "--max-steps": _is(int, 8, COUNT), "--set": _of_task},
         ("lossk.cli.tune.open_grid",)),
        ("run", {"config": "digits", "--out": "fresh.lossk", "--set": ""},
         {"config": _never, "--out": _suffix(".lossk"), "--set": _of_task}, ("lossk.cli.running.execute",)),
        ("demo", {"--out": "fresh"}, {"--out": _folder}, ("lossk.cli.running.execute",)),
    ]  # fmt: skip
    return [_command(*command) for command in commands]


def _command(name: str, given: dict[str, str], rules: dict[str, r.Rule], work: tuple[str, ...]) -> Entry:
    def call(**texts: str) -> None:
        positional = [texts[option] for option in given if not option.startswith("--")]
        named = {option: text for option, text in texts.items() if option.startswith("--") and text is not UNSET}
        run(name, *(f"{option}={text}" for option, text in named.items()), *(["--", *positional] if positional else []))

    def arguments() -> dict[str, Any]:
        return {option: text or UNSET for option, text in given.items()}

    known = {option: rules[option] for option in given}
    words: dict[str, tuple[str, ...]] = {option: (option.strip("-").replace("-", "_"),) for option in given}
    words |= dict.fromkeys(("store", "a", "b", "out"), ("path", "store")) | {"--set": KEYS}
    return Entry(f"lossk {name}", call, arguments, known, words, work, texts=TEXTS)


UNSET: Any = None  # an option that the valid call does without


def _never(text: Any) -> bool:
    return False


def _there(text: Any) -> bool:
    return False  # none of the texts is the path of a store


def _folder(text: Any) -> bool:
    return text == "." or r.path(text)


def _of_task(text: Any) -> bool:
    """What the task's own arguments may be, the task says."""
    return text.startswith("task_args.")


def _rows(text: Any) -> bool:
    return text in ("train", "0", "1", "5", "7", "0-2")


def _multiple(text: Any) -> bool:
    return _is(float, 1e-37, 3e38)(text.removesuffix("x"))


def keys(w: World) -> list[Entry]:
    """An entry for each part of a config, whose parameters are its keys."""
    from . import table_core
    from .table import Table

    table = Table()
    table_core._samplers(table)
    build: dict[str, r.Rule] = {
        "num_chains": r.integer(1), "num_draws": r.integer(2), "tile": r.integer(16), "panel": r.optional(r.integer(1)),
        "dtype": STORED, "centering": CENTERING, "form": r.choice("tiles", "factor"), "backend": BACKEND,
        "memory": r.optional(r.either(r.number(above=0.0), r.text)), "precision": PRECISION, "seed": SEED,
        "device": r.optional(r.either(r.text, r.anything)),
    }  # fmt: skip
    sampler, passes = table.entries["lossk.SGLD"].rules, table.entries["lossk.Passes"].rules
    plain = r.mapping_of(r.text, r.anything)
    top: dict[str, r.Rule] = {
        "task": _never, "task_args": plain, "build": r.choice(), "sampler": r.choice(), "passes": r.choice(None),
        "out": _suffix(".lossk"), "picture": r.optional(r.path), "report": r.optional(r.path),
        "threads": r.optional(r.integer(1)),
    }  # fmt: skip
    empty: dict[str, r.Rule] = {name: r.either(rule, _is_empty_mapping) for name, rule in top.items()}
    counts = {"num_chains": r.integer(2), "num_draws": r.integer(4), "probe": r.integer(2), "max_steps": r.integer(80)}
    return [
        _part("config", lambda **value: RunConfig(**{"task": "lossk.recipes.digits:make_task", **value}), empty),
        _part("config build", lambda **value: _config(build=value), build),
        _part("config sampler", lambda **value: _config(sampler=value), sampler),
        _part("config passes", lambda **value: _config(passes=value), passes),
        _part("config tune", lambda **value: GridSettings(**value), counts),
    ]


def _is_empty_mapping(value: Any) -> bool:
    return isinstance(value, dict) and not value


def _config(**part: Any) -> RunConfig:
    return RunConfig(task="lossk.recipes.digits:make_task", **part)


def _part(name: str, function: Callable[..., Any], rules: dict[str, r.Rule]) -> Entry:
    return Entry(name, function, dict, rules)
