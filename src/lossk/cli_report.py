"""`lossk report`: one HTML file that shows a store."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import numpy as np

from lossk.cli_options import existing, file_path, named, whole
from lossk.plan import gigabytes


def add_command(commands: Any) -> None:
    """Add it to the parser's subcommands."""
    report = commands.add_parser("report", help="one HTML file that shows a store: map, neighbours, matrix, chains")
    report.add_argument("store", type=file_path)
    report.add_argument("--out", type=file_path, metavar="FILE.html", help="default: beside the store, with its name")
    report.add_argument(
        "--labels", type=existing, metavar="FILE", help=".npy of integers, or .csv of class numbers or names"
    )
    report.add_argument(
        "--images", type=existing, metavar="FILE.npy", help="[N, H, W] or [N, H, W, 3], uint8 or floats in [0, 1]"
    )
    report.add_argument("--texts", type=existing, metavar="FILE.txt", help="one line per sample")
    report.add_argument("--title", help="default: the store's name")
    report.add_argument("--seed", type=whole(0, 2**32 - 1), default=0, help="of the map; default: 0")
    report.add_argument("--overwrite", action="store_true", help="replace an earlier report")
    report.set_defaults(run=run_report)


def run_report(options: argparse.Namespace) -> None:
    from lossk.report import write_report

    store = Path(options.store)
    out = store.with_suffix(".html") if options.out is None else Path(options.out)
    labels, class_names = (None, ()) if options.labels is None else named("--labels", read_labels, Path(options.labels))
    images = None if options.images is None else named("--images", read_array, Path(options.images))
    texts = None if options.texts is None else named("--texts", _lines, Path(options.texts))
    write_report(
        store,
        out,
        labels=labels,
        class_names=class_names,
        images=images,
        texts=texts,
        title=options.title,
        seed=options.seed,
        overwrite=options.overwrite,
    )
    print(f"wrote {out}  {gigabytes(out.stat().st_size)}; open it in a browser, no network needed")


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines()


def read_array(file: Path) -> np.ndarray:
    """An .npy file, mapped rather than read, pickling refused."""
    if file.suffix != ".npy":
        raise ValueError(f"{str(file)!r} must be an .npy file")
    return np.load(file, mmap_mode="r", allow_pickle=False)


def read_labels(file: Path) -> tuple[np.ndarray, list[str]]:
    """Labels [N] int64 and the classes' names, empty where the file has numbers.

    A CSV has one column, or a heading with a column `label`. Names are numbered in alphabetical order.
    """
    if file.suffix == ".npy":
        return np.asarray(read_array(file)), []
    if file.suffix != ".csv":
        raise ValueError(f"labels must be an .npy or a .csv file, got {str(file)!r}")
    with file.open(newline="", encoding="utf-8") as opened:
        rows = [row for row in csv.reader(opened) if row]
    if not rows:
        raise ValueError(f"{str(file)!r} is empty")
    column = 0
    if "label" in rows[0]:
        column, rows = rows[0].index("label"), rows[1:]
    elif len(rows[0]) != 1:
        raise ValueError(f"{str(file)!r} must have one column, or a heading with a column 'label', got {rows[0]}")
    short = [number for number, row in enumerate(rows) if len(row) <= column]
    if short:
        raise ValueError(f"{str(file)!r}: row {short[0]} has no column {column}")
    values = [row[column].strip() for row in rows]
    if all(value.isdecimal() for value in values):
        return np.array(values, dtype=np.int64), []
    names, numbers = np.unique(np.array(values, dtype=np.str_), return_inverse=True)
    return numbers.astype(np.int64), [str(name) for name in names]
