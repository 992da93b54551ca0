"""The arguments of every command, each with its help. Nothing else is imported here: `lossk --help` starts at once.

What a command does is imported when it runs: `later` names the function.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lossk.cli.options import existing, file_path, folder, real, store_path, whole

STORE = "path of a store, e.g. runs/digits.lossk"
LABELS = (
    "classes of the samples, in their order: a .csv or text file, one class a line, number or name; a .npy file of "
    "numbers; or 'config', the task of the YAML beside the store. Default: those that the store or STORE.samples.npz "
    "keeps. E.g. labels.csv"
)
TRUST = "with --labels config: let the YAML beside the store name code other than the packaged recipes, and run it"
CONFIG = "a YAML file, e.g. mine.yaml, or a recipe: {}"
MOST_JOBS = 1024  # processes
SEED = "of random numbers, e.g. 7; default 0"
TABLE, PICTURE = "near.csv or near.parquet", "map.png, map.csv or map.parquet"

Run = Callable[[argparse.Namespace], int | None]


def later(module: str, function: str) -> Run:
    """The function of a module of this package, imported when it is called."""

    def run(options: argparse.Namespace) -> int | None:
        return getattr(importlib.import_module(f"lossk.cli.{module}"), function)(options)

    return run


def recipe_names() -> list[str]:
    """The recipes that `lossk run` takes, as `lossk.recipes.packaged_names` says."""
    return sorted(path.stem for path in (Path(__file__).parents[1] / "recipes").glob("*.yaml"))


def add_commands(commands: Any) -> None:
    """Add them all, in the order in which help lists them."""
    for add in (
        _demo,
        _run,
        _tune,
        _info,
        _report,
        _neighbors,
        _map,
        _hierarchy,
        _compare,
        _attribute,
        _verify,
        _export,
        _doctor,
        _completion,
    ):
        add(commands)


def _add(commands: Any, name: str, says: str, example: str, run: Run) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=says, description=f"{says[0].upper()}{says[1:]}.", epilog=f"example: {example}"
    )
    parser.set_defaults(run=run)
    return parser


def _seed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=whole(0, 2**32 - 1), default=0, metavar="N", help=SEED)


def _labels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--labels", type=file_path, metavar="FILE", help=LABELS)
    parser.add_argument("--trust", action="store_true", help=TRUST)


def _out(parser: argparse.ArgumentParser, example: str) -> None:
    parser.add_argument(
        "--out",
        type=file_path,
        action="append",
        default=[],
        metavar="FILE",
        help=f"write it, too; may be given several times. E.g. {example}",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


def _set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a key of the config; may be given several times. E.g. build.num_draws=50",
    )


def _demo(commands: Any) -> None:
    demo = _add(
        commands,
        "demo",
        "train on real digits, build their kernel, draw it (about a minute)",
        "lossk demo --out /tmp/demo",
        later("running", "run_demo"),
    )
    demo.add_argument(
        "--out",
        type=folder,
        default=".",
        metavar="DIR",
        help="folder for demo.lossk, demo.yaml and demo.png, e.g. /tmp/demo; default: this one",
    )
    demo.add_argument("--overwrite", action="store_true", help="replace an earlier demo's files")


def _run(commands: Any) -> None:
    run = _add(
        commands,
        "run",
        "run a recipe or a config file",
        "lossk run fashion --out fashion.lossk --set build.num_draws=100",
        later("running", "run_config"),
    )
    run.add_argument("config", help=CONFIG.format(", ".join(recipe_names())))
    run.add_argument(
        "--out", type=store_path, metavar="STORE", help="path of the store, instead of the config's, e.g. mine.lossk"
    )
    _set(run)
    group = run.add_mutually_exclusive_group()
    group.add_argument("--overwrite", action="store_true", help="replace what an earlier run wrote")
    group.add_argument("--resume", action="store_true", help="continue an interrupted run")


def _tune(commands: Any) -> None:
    tune = _add(
        commands,
        "tune",
        "try n_beta and localization on a grid of short runs; a verdict for each",
        "lossk tune digits --n-beta 0.1x 1x 10x --jobs 2",
        later("tune", "run_tune"),
    )
    tune.add_argument("config", help=CONFIG.format(", ".join(recipe_names())))
    tune.add_argument(
        "--out",
        type=folder,
        metavar="FOLDER",
        help="of the grid, e.g. digits.tune; default: the config's out, ending in .tune",
    )
    values = "numbers, or multiples of the middle; e.g. 30 10x"
    tune.add_argument("--n-beta", nargs="+", metavar="VALUE", help=values)
    tune.add_argument("--localization", nargs="+", metavar="VALUE", help=values)
    tune.add_argument(
        "--jobs",
        type=whole(1, ceiling=MOST_JOBS),
        default=1,
        metavar="K",
        help="processes, of one thread each, e.g. 4; default 1",
    )
    _set(tune)
    tune.add_argument("--probe", type=int, default=512, metavar="N", help="most probe samples, e.g. 256; default 512")
    tune.add_argument("--num-chains", type=int, default=4, metavar="C", help="chains of a cell, e.g. 2; default 4")
    tune.add_argument("--num-draws", type=int, default=40, metavar="T", help="draws of a chain, e.g. 80; default 40")
    tune.add_argument(
        "--max-steps", type=int, default=5000, metavar="S", help="most steps of a chain, e.g. 1500; default 5000"
    )
    group = tune.add_mutually_exclusive_group()
    group.add_argument("--overwrite", action="store_true", help="begin again in a folder that is there")
    group.add_argument("--resume", action="store_true", help="finish or extend a grid")


def _info(commands: Any) -> None:
    info = _add(
        commands,
        "info",
        "what a store holds, and how far to trust it",
        "lossk info runs/digits.lossk",
        later("stores", "run_info"),
    )
    info.add_argument("store", type=folder, help=STORE)
    info.add_argument("--json", action="store_true", help="everything, in full, as JSON")


def _report(commands: Any) -> None:
    report = _add(
        commands,
        "report",
        "one HTML file that shows a store: map, neighbors, matrix, chains",
        "lossk report mine.lossk --labels labels.csv --images images.npy",
        later("report", "run_report"),
    )
    report.add_argument("store", type=folder, help=STORE)
    report.add_argument(
        "--out", type=file_path, metavar="FILE.html", help="e.g. mine.html; default: beside the store, with its name"
    )
    _labels(report)
    report.add_argument(
        "--images",
        type=existing,
        metavar="FILE.npy",
        help="[N, H, W] or [N, H, W, 3], uint8 or floats in [0, 1], e.g. images.npy",
    )
    report.add_argument("--texts", type=existing, metavar="FILE.txt", help="one line per sample, e.g. texts.txt")
    report.add_argument("--title", metavar="TEXT", help="e.g. 'Digits, 2 layers'; default: the store's name")
    _seed(report)
    report.add_argument("--overwrite", action="store_true", help="replace an earlier report")


def _neighbors(commands: Any) -> None:
    near = _add(
        commands,
        "neighbors",
        "nearest neighbors with standard errors and the noise floor",
        "lossk neighbors mine.lossk --k 5 --rows 3 17 --out near.csv",
        later("insight", "run_neighbors"),
    )
    near.add_argument("store", type=folder, help=STORE)
    near.add_argument("--k", type=whole(1), default=10, help="neighbors of each sample, e.g. 5; default 10")
    near.add_argument("--rows", type=int, nargs="+", metavar="ROW", help="only these samples', e.g. 3 17; default all")
    near.add_argument("--anti", action="store_true", help="the most anti-correlated instead")
    near.add_argument(
        "--show", type=whole(0), default=10, metavar="N", help="samples that are printed, e.g. 50; default 10"
    )
    _labels(near)
    _out(near, TABLE)


def _map(commands: Any) -> None:
    drawn = _add(
        commands,
        "map",
        "a UMAP map of the samples, and clusters on it",
        "lossk map mine.lossk --labels labels.csv --out map.png",
        later("insight", "run_map"),
    )
    drawn.add_argument("store", type=folder, help=STORE)
    _labels(drawn)
    drawn.add_argument("--dimensions", type=whole(1, 10), default=2, metavar="D", help="of the map, e.g. 3; default 2")
    drawn.add_argument(
        "--num-neighbors",
        type=whole(2),
        default=30,
        metavar="K",
        help="that the map keeps together, e.g. 15; default 30",
    )
    drawn.add_argument(
        "--min-dist",
        type=real(0.0, 1.0),
        default=0.1,
        metavar="D",
        help="how close points may lie, e.g. 0.3; default 0.1",
    )
    drawn.add_argument(
        "--min-cluster-size",
        type=whole(2),
        default=15,
        metavar="N",
        help="samples of the smallest cluster, e.g. 50; default 15",
    )
    _seed(drawn)
    _out(drawn, PICTURE)


def _hierarchy(commands: Any) -> None:
    classes = _add(
        commands,
        "hierarchy",
        "how classes relate, and whether a taxonomy agrees",
        "lossk hierarchy mine.lossk --labels labels.csv --taxonomy fashion",
        later("insight", "run_hierarchy"),
    )
    classes.add_argument("store", type=folder, help=STORE)
    _labels(classes)
    classes.add_argument(
        "--taxonomy",
        type=file_path,
        metavar="FILE",
        help="YAML, 'synsets: {class: WordNet synset}' or 'tree: {...}', e.g. tree.yaml; or 'fashion'",
    )
    classes.add_argument("--absolute", action="store_true", help="cluster by mean |R| instead of mean R")
    _seed(classes)
    _out(classes, "tree.png or tree.csv")


def _compare(commands: Any) -> None:
    both = _add(
        commands,
        "compare",
        "two kernels of the same samples: entries, CKA, neighbors",
        "lossk compare a.lossk b.lossk --k 20",
        later("insight", "run_compare"),
    )
    both.add_argument("a", type=folder, help="path of the first store, e.g. before.lossk")
    both.add_argument("b", type=folder, help="path of the second, e.g. after.lossk")
    both.add_argument("--k", type=whole(1), default=10, help="neighbors compared, e.g. 20; default 10")
    _out(both, "both.csv")


def _attribute(commands: Any) -> None:
    parser = _add(
        commands,
        "attribute",
        "which training samples help and harm each query",
        "lossk attribute mine.lossk --query test --top 10 --out influence.csv",
        later("attribution", "run_attribute"),
    )
    parser.add_argument("store", type=folder, help=STORE)
    parser.add_argument(
        "--query", required=True, metavar="SET", help="a set of the store, e.g. test, or row numbers, e.g. 3,17,40-49"
    )
    parser.add_argument(
        "--train", metavar="SET", help="likewise, e.g. 0-999; default: the set 'train' or, without sets, every row"
    )
    parser.add_argument(
        "--top", type=whole(1), default=10, metavar="K", help="samples of either kind per query, e.g. 5; default 10"
    )
    parser.add_argument(
        "--by", choices=("influence", "correlation"), default="influence", help="rank by K or by R; default influence"
    )
    _labels(parser)
    parser.add_argument(
        "--out", type=file_path, metavar="TABLE", help="write the whole table, e.g. influence.csv or influence.parquet"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier table")


def _verify(commands: Any) -> None:
    verify = _add(
        commands,
        "verify",
        "check every checksum of a store, and that it can be a kernel",
        "lossk verify mine.lossk",
        later("stores", "run_verify"),
    )
    verify.add_argument("store", type=folder, help=STORE)


def _export(commands: Any) -> None:
    export = _add(
        commands,
        "export",
        "write the whole N x N matrix for other tools",
        "lossk export mine.lossk k.npy --format npy",
        later("stores", "run_export"),
    )
    export.add_argument("store", type=folder, help=STORE)
    export.add_argument("out", type=file_path, help="path to write, which must not exist, e.g. k.zarr")
    export.add_argument("--format", choices=("zarr", "npy"), default="zarr", help="default zarr")
    export.add_argument("--correlation", action="store_true", help="R instead of K")


def _doctor(commands: Any) -> None:
    _add(
        commands,
        "doctor",
        "what is compiled, what passes its self-test, and why not",
        "lossk doctor",
        later("doctor", "run_doctor"),
    )


def _completion(commands: Any) -> None:
    shell = _add(
        commands,
        "completion",
        "the script by which a shell completes commands and options",
        'eval "$(lossk completion bash)"',
        later("completion", "run_completion"),
    )
    shell.add_argument("shell", choices=("bash", "zsh"), help="whose script, e.g. bash")
