"""All benchmarks of the engine: one page, one record. Nothing is measured on a red test.

python -m bench [--quick] [--peer1-python PYTHON] [--peer2-python PYTHON] [--checkpoint CNN.pt]
                [--only NAME ...] [--out docs/bench.md] [--record bench/results/bench.json]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from bench import (
    end_to_end,
    growth,
    language,
    memory,
    options,
    prefix,
    profiling,
    rank_update,
    sample_loss,
    sgld_step,
    stacking,
)
from bench.machine import ROOT, described, environment
from bench.options import Found

# In the order of the page.
PARTS: dict[str, ModuleType] = {
    "end_to_end": end_to_end,
    "language": language,
    "prefix": prefix,
    "stacking": stacking,
    "profiling": profiling,
    "memory": memory,
    "growth": growth,
    "sgld_step": sgld_step,
    "sample_loss": sample_loss,
    "rank_update": rank_update,
}
TESTS = (
    "tests/unit/accumulate/test_streaming.py",
    "tests/unit/samplers/test_sgld.py",
    "tests/unit/ops/test_sample_loss.py",
)


def measure(chosen: options.Options, only: Sequence[str], command: str) -> Found:
    """The whole record of the parts asked for."""
    record: Found = {"command": command, "environment": environment(chosen.threads), "size": chosen.size}
    for name in only:
        print(f"== {name}", file=sys.stderr, flush=True)
        start = time.perf_counter()
        record[name] = PARTS[name].measure(chosen)
        record.setdefault("took", {})[name] = round(time.perf_counter() - start, 1)
    return record


def page(record: Found) -> str:
    """All sections, under what was run where."""
    parts = ["# Benchmarks", *header(record)]
    parts += [part.section(record[name]) for name, part in PARTS.items() if name in record]
    return "\n\n".join(parts) + "\n"


def header(record: Found) -> list[str]:
    machine = record["environment"]
    versions = described(machine["versions"])
    taken = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in record["took"].items())
    found = [
        f"`{record['command']}`: {machine['device']}, {machine['cores']} cores, {machine['memory_gb']} GB, "
        f"{machine['threads']} thread(s), {machine['simd']}; {versions}; git {machine['git_sha']}. "
        f"Load average before it began: {machine['load_average']}. Took {taken}."
    ]
    if record["size"] != "full":
        found.append("**A quick run: fewer samples, draws and rounds than a result needs.**")
    return found


def require_green() -> None:
    """Run a few tests of what is measured, and leave if one fails. Under pytest that is pytest's own business."""
    if "PYTEST_CURRENT_TEST" in os.environ:
        return
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", *TESTS], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout[-3000:], file=sys.stderr)
        raise SystemExit(f"nothing measured: {' '.join(TESTS)} must pass first")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    print(f"wrote {path}")


def public(words: Sequence[str]) -> str:
    """The command as anyone would type it: without the folders of this machine."""
    return " ".join(["python -m bench", *(Path(word).name if Path(word).is_absolute() else word for word in words)])


def main(words: Sequence[str] | None = None) -> None:
    words = sys.argv[1:] if words is None else words
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_arguments(parser)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to measure")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "bench.md", help="the page")
    parser.add_argument("--record", type=Path, default=ROOT / "bench" / "results" / "bench.json", help="its numbers")
    arguments = parser.parse_args(words)
    chosen = options.read(arguments)
    require_green()
    record = measure(chosen, arguments.only, public(words))
    write(arguments.record, json.dumps(record, indent=1) + "\n")
    write(arguments.out, page(record))


if __name__ == "__main__":
    main()
