"""What a kernel is worth: biases, verdicts, laws, error bars and floors, each beside a truth without the engine's code.

python -m bench.calibration [--only bias verdicts law coverage floors] [--seeds N] [--out docs/calibration.md]
                            [--results bench/results/calibration]

Every section writes its own JSON as its rows come; the page is made of all that are there. Truths: closed forms,
quadrature, and a Hamiltonian Monte Carlo in float64 written for this (`bench.calibration_truth`).
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import calibration_bias, calibration_law, calibration_verdicts
from bench.machine import ROOT, environment
from bench.markdown import table

Record = dict[str, Any]
SECTIONS = ("bias", "verdicts", "law", "coverage", "floors")
SEEDS = {"bias": 5, "verdicts": 4, "law": 10, "coverage": 20, "floors": 8}
OWN = {"bias": calibration_bias, "verdicts": calibration_verdicts, "law": calibration_law}
ELSEWHERE = {"coverage": ("bench.calibration_errors", "coverage_table"),
             "floors": ("bench.calibration_floors", "floors_table")}  # fmt: skip
HEAD = """# Calibration

`python -m bench.calibration`: what a kernel is worth, by runs whose truth is known. Truths are closed forms (T1, T7 of
the mathematics), quadrature, or Hamiltonian Monte Carlo in float64 with its own model functions: none of the engine's
code. Each section also runs alone (`--only bias`)."""


def measure(section: str, seeds: int, results: Path, small: bool = False) -> Record | None:
    """Run a section and keep its record as it grows; None where this checkout has no such part."""
    start, path = time.perf_counter(), results / f"{section}.json"
    record: Record = {"section": section, "seeds": seeds, "environment": environment(torch.get_num_threads())}

    def keep(rows: Any) -> None:
        record["rows"], record["seconds"] = rows, round(time.perf_counter() - start, 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")

    if section in OWN:
        for rows in OWN[section].measure(range(seeds), small):
            keep(rows)
            print(f"{section}: {len(rows)} rows, {record['seconds']:.0f} s", file=sys.stderr, flush=True)
        return record
    module, function = ELSEWHERE[section]
    if importlib.util.find_spec(module) is None:
        print(f"{section}: no {module} here", file=sys.stderr)
        return None
    keep(getattr(importlib.import_module(module), function)(seeds))
    return record


def page(results: Path) -> str:
    """All sections whose record is there."""
    parts = [HEAD]
    for section in SECTIONS:
        path = results / f"{section}.json"
        if not path.exists():
            continue
        record = json.loads(path.read_text())
        text = OWN[section].section(record) if section in OWN else _elsewhere(section, record["rows"])
        machine = record["environment"]
        parts += [
            text,
            f"{record['seeds']} seeds, {record['seconds']:.0f} s; {machine['device']}, {machine['threads']} thread(s), "
            f"load {machine['load_average']}; git {machine['git_sha']}.",
        ]
    return "\n\n".join(parts) + "\n"


def _elsewhere(section: str, rows: list[Record]) -> str:
    """By the part's own words, or a plain table of its rows."""
    title, module = {"coverage": "Coverage", "floors": "Noise floors"}[section], ELSEWHERE[section][0]
    part = importlib.import_module(module) if importlib.util.find_spec(module) else None
    if part is not None and hasattr(part, "section"):
        return f"## {title}\n\n{part.section(rows)}"
    cells = [[f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    return f"## {title}\n\n{table(list(rows[0]), cells)}"


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.calibration",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--seeds", type=int, help="of each section; default: " + json.dumps(SEEDS))
    parser.add_argument("--small", action="store_true", help="a row or two of each section: a look")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "calibration.md")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results" / "calibration")
    parser.add_argument("--page-only", action="store_true", help="measure nothing; write the page of the records there")
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    for section in () if options.page_only else options.only:
        measure(section, options.seeds or SEEDS[section], options.results, options.small)
        options.out.write_text(page(options.results))
    options.out.write_text(page(options.results))
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
