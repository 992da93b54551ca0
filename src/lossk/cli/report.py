"""`lossk report`: one HTML file that shows a store."""

from __future__ import annotations

import argparse
from pathlib import Path

from lossk.available import gigabytes
from lossk.cli.class_labels import read_asked
from lossk.cli.label_files import read_array, read_lines
from lossk.cli.options import named
from lossk.kernel.from_store import open_kernel


def run_report(options: argparse.Namespace) -> None:
    from lossk.report import write_report

    store = Path(options.store)
    out = store.with_suffix(".html") if options.out is None else Path(options.out)
    labels, class_names = None, list[str]()
    if options.labels is not None:
        labels, class_names = read_asked(options, len(open_kernel(store)))
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
