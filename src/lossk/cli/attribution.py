"""`lossk attribute`: which training samples help and harm each query, from a store."""

from __future__ import annotations

import argparse
import importlib.util
import re
from pathlib import Path

from lossk.analysis.attribution import Influence, influence
from lossk.analysis.tables import write_csv
from lossk.checks import shown
from lossk.cli.class_labels import open_named
from lossk.cross import CrossKernel
from lossk.errors import LosskError
from lossk.kernel.kernel import LossKernel

SUFFIXES = (".csv", ".parquet")
SHOWN = 5  # queries that are printed


def run_attribute(options: argparse.Namespace) -> None:
    out = None if options.out is None else check_table(Path(options.out), overwrite=options.overwrite)
    kernel = open_named(options)
    train = "train" if kernel.sets else "all"
    cross = CrossKernel(
        kernel,
        _rows("--train", kernel, train if options.train is None else options.train),
        _rows("--query", kernel, options.query),
    )
    found = influence(cross, top=min(options.top, cross.num_train), by=options.by)
    print(kernel)
    if kernel.diagnostics is not None:
        print(f"verdict: {kernel.diagnostics.verdict}")
    print(describe(found, cross))
    if out is not None:
        frame = found.to_frame()
        write_csv(frame, out) if out.suffix == ".csv" else frame.to_parquet(out, index=False)
        print(f"wrote {out}  {len(frame):,} rows")


def _rows(option: str, kernel: LossKernel, text: str) -> str | list[int] | slice:
    """A set's name, "all", or the rows of "3,17,40-49"."""
    if text in kernel.sets:
        return text
    if text == "all":
        return slice(None)
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        known = ", ".join(kernel.sets) or "none: it was built from a single probe"
        raise ValueError(
            f"{option} must name a set of the kernel, got {shown(text)}; its sets are {known}; rows can be given, too"
        )
    rows: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if max(len(first), len(last)) > len(str(kernel.num_samples)) or int(last or first) < int(first):
            raise ValueError(f"{option}: {shown(part)} is not among the {kernel.num_samples} rows of the kernel")
        end = int(last or first)
        if end >= kernel.num_samples:
            raise ValueError(f"{option}: row {end} is not among the {kernel.num_samples} rows of the kernel")
        rows += range(int(first), end + 1)
    return rows


def describe(found: Influence, cross: CrossKernel) -> str:
    """The strongest samples of the first queries, by their number in the data, and as the kernel calls them."""
    lines = ["BIF = -K in nats^2, with its Monte Carlo error; * stands above the query's noise floor"]
    for j, query in enumerate(found.query_samples[:SHOWN].tolist()):
        name = _called(cross, query, int(cross._query[j]))
        lines.append(f"query {name}  (noise floor |R| {float(found.noise_floor[j]):.3f})")
        for kind, ranked, sign in (("helpful", found.helpful, -1), ("harmful", found.harmful, 1)):
            parts = []
            for k in range(min(3, ranked.row.shape[1])):
                value, error = float(ranked.influence[j, k]), float(ranked.standard_error[j, k])
                if value * sign > 0:
                    star = "*" if ranked.significant[j, k] else ""
                    name = _called(cross, int(ranked.samples[j, k]), int(cross._train[int(ranked.row[j, k])]))
                    parts.append(f"{name} ({value:.2e} +- {error:.1e}){star}")
            lines.append(f"  {kind}  {', '.join(parts) or 'none'}")
    if len(found.query_samples) > SHOWN:
        lines.append(f"... and {len(found.query_samples) - SHOWN} more queries; --out TABLE writes them all")
    above = float((found.helpful.significant & (found.helpful.influence < 0)).double().mean())
    lines.append(f"helpful samples above the noise floor: {above:.1%} of those ranked")
    return "\n".join(lines)


def _called(cross: CrossKernel, sample: int, row: int) -> str:
    """A sample by its number within its set, and by its id and class where the kernel's rows have them."""
    names = cross.kernel.names
    return f"{sample} [{names.row(row)}]" if len(names) else str(sample)


def check_table(table: Path, *, overwrite: bool) -> Path:
    """Refuse, before any work, a table that cannot be written.

    Raises:
        ValueError: neither .csv nor .parquet.
        FileExistsError: it exists.
        LosskError: a package is missing.
    """
    if table.suffix not in SUFFIXES:
        raise ValueError(f"--out must end in {' or '.join(SUFFIXES)}, got {str(table)!r}")
    if table.exists() and not overwrite:
        raise FileExistsError(f"--out: {table} exists; pass --overwrite to replace it, or another --out")
    if not table.parent.is_dir():
        raise FileNotFoundError(f"--out: there is no folder {str(table.parent)!r}")
    needed = ("pandas",) if table.suffix == ".csv" else ("pandas", "pyarrow")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise LosskError(f'a table needs {" and ".join(missing)}: pip install "lossk[analysis]"')
    return table
