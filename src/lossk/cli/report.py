"""`lossk report`: one HTML file that shows a store."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from lossk.available import gigabytes
from lossk.cli.label_files import read_array, read_classes, read_lines
from lossk.cli.options import existing, file_path, folder, named, whole


def add_command(commands: Any) -> None:
    """Add it to the parser's subcommands."""
    report = commands.add_parser("report", help="one HTML file that shows a store: map, neighbors, matrix, chains")
    report.add_argument("store", type=folder)
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
    texts = None if options.texts is None else named("--texts", read_lines, Path(options.texts))
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


def read_labels(path: Path) -> tuple[np.ndarray, list[str]]:
    """Labels [N] int64 and the classes' names, empty where the file has numbers."""
    if path.suffix not in (".npy", ".csv"):
        raise ValueError(f"labels must be an .npy or a .csv file, got {str(path)!r}")
    return read_classes(path)
