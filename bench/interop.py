"""devinterp's own calls and lossk's in their place: time and peak memory, in the same run.

    python -m bench.interop --peer1-python PYTHON --peer2-python PYTHON [--record FILE]

Each call is made once in a fresh process, on one thread; theirs in the peer's Python, ours in this one. Turns
alternate. Times are of the processor, which other work disturbs less than the clock's; even so, read ratios.
Peak memory is what the call adds to its process, its data made and its libraries loaded before: the result counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bench.machine import ROOT, environment
from bench.markdown import megabytes, seconds, table


def run(python: str, spec: dict[str, Any]) -> dict[str, Any]:
    """One call in a process of its own.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(json.dumps(spec))
        file.flush()
        command = [python, "-m", "bench.interop_call", file.name]
        done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every call, both ways, `rounds` times in turn."""
    calls: list[tuple[str, dict[str, Any], str]] = []
    for n in options.num_samples:
        shape = {"num_chains": 4, "num_draws": options.num_draws, "num_samples": n}
        calls.append((f"compute_bif, N = {n:,}", {"call": "influence", **shape}, options.peer2_python))
    for width in options.widths:
        calls.append((f"100 SGLD steps, width {width:,}", {"call": "step", "width": width}, options.peer1_python))
    rows = []
    for name, spec, python in calls:
        sides: dict[str, list[dict[str, Any]]] = {"theirs": [], "ours": []}
        for _ in range(options.rounds):
            if python is not None:
                sides["theirs"].append(run(python, {**spec, "who": "theirs"}))
            sides["ours"].append(run(sys.executable, {**spec, "who": "ours"}))
        row: dict[str, Any] = {"name": name, **spec}
        for side, found in sides.items():
            if found:
                row[side] = {
                    "made_by": found[0]["made_by"],
                    "cpu_seconds": statistics.median(one["cpu_seconds"] for one in found),
                    "seconds": statistics.median(one["seconds"] for one in found),
                    "peak_bytes": max(one["peak_bytes"] for one in found),
                }
        if spec["call"] == "influence" and sides["theirs"]:
            corners = [np.array(sides[side][0]["corner"]) for side in ("theirs", "ours")]
            row["largest_difference"] = float(np.abs(corners[0] - corners[1]).max())
        rows.append(row)
    return rows


def section(rows: list[dict[str, Any]]) -> str:
    """The table of the page."""
    head = ["", "theirs", "ours", "theirs / ours", "their memory", "ours", "largest difference"]
    lines = []
    for row in rows:
        ours, theirs = row["ours"], row.get("theirs")
        ratio = "" if theirs is None else f"{theirs['cpu_seconds'] / ours['cpu_seconds']:.1f}"
        lines.append(
            [
                row["name"],
                "" if theirs is None else seconds(theirs["cpu_seconds"]),
                seconds(ours["cpu_seconds"]),
                ratio,
                "" if theirs is None else megabytes(theirs["peak_bytes"]),
                megabytes(ours["peak_bytes"]),
                f"{row['largest_difference']:.1g}" if "largest_difference" in row else "",
            ]
        )
    return table(head, lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer1-python", help="a Python with devinterp 1.3.2; without it ours is measured alone")
    parser.add_argument("--peer2-python", help="a Python with devinterp 2.0.1")
    parser.add_argument("--num-samples", type=int, nargs="+", default=[2000, 8000])
    parser.add_argument("--num-draws", type=int, default=100, help="per chain, of 4")
    parser.add_argument("--widths", type=int, nargs="*", default=[256, 1000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--record", type=Path, default=ROOT / "bench" / "results" / "interop.json")
    options = parser.parse_args(arguments)
    about = environment(1)
    rows = measure(options)
    options.record.write_text(json.dumps({"environment": about, "found": rows}, indent=1) + "\n")
    print(section(rows))


if __name__ == "__main__":
    main()
