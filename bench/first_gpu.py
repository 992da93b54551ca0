"""The first minutes on a GPU: everything worth knowing there, in one command that needs no registry and no build.

    python -m bench.first_gpu [--out DIR] [--minutes 8] [--only STAGE ...] [--tiny] [--standin]

Runs from a source folder. Every stage is a process of its own with a time limit of its own, so that one that crashes or
hangs costs the others nothing; what it finds is in DIR/STAGE.json as soon as it is known, what it prints in
DIR/STAGE.log, and how all of them went in DIR/summary.json after each. Packages that the machine lacks can lie in
`vendor/` (`pip install --no-deps --target vendor arviz-stats`): it is on the path of every stage.

--tiny runs small sizes. --standin has the tests' stand-in for a CUDA device take its place, where there is none.

This file has never run on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (ROOT / "src", ROOT, ROOT / "vendor")


@dataclass(frozen=True)
class Stage:
    """One process."""

    name: str  # of a function of `bench.first_gpu_stages`; after a colon, its argument
    seconds: float  # that it may take
    beside: bool = False  # run at the same time as its neighbors that are so too


OPS = ("sgld_step", "rank_update", "sample_loss", "head_loss", "top_correlations")
STAGES = (
    Stage("versions", 40),
    *(Stage(f"self_test:{op}", 90, beside=True) for op in OPS),
    Stage("small_build", 60),
    Stage("repeat", 60),
    Stage("default_sampler", 75),
    Stage("ops", 120),
    Stage("forward", 100),
    Stage("large_build", 180),
)


def groups(stages: Sequence[Stage]) -> Iterator[list[Stage]]:
    """The stages in order, those that run beside each other together."""
    together: list[Stage] = []
    for stage in stages:
        if together and not (stage.beside and together[-1].beside):
            yield together
            together = []
        together.append(stage)
    if together:
        yield together


def file_of(out: Path, stage: str, ending: str) -> Path:
    return out / f"{stage.replace(':', '-')}.{ending}"


def run_together(stages: Sequence[Stage], command: Sequence[str], out: Path, left: float) -> dict[str, Any]:
    """How each stage went: "ok", "failed", "out of time" or "not started", and its seconds."""
    if left < 1:
        return {stage.name: {"state": "not started", "seconds": 0.0} for stage in stages}
    path = os.pathsep.join([*map(str, FOLDERS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    begun, running, found = time.monotonic(), {}, {}
    with contextlib.ExitStack() as files:
        for stage in stages:
            log = files.enter_context(file_of(out, stage.name, "log").open("w"))
            running[stage] = subprocess.Popen(
                [*command, "--stage", stage.name], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        for stage, process in running.items():
            try:
                code = process.wait(max(min(stage.seconds, left) - (time.monotonic() - begun), 0.1))
                state = "ok" if code == 0 else "failed"
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                state = "out of time"
            found[stage.name] = {"state": state, "seconds": round(time.monotonic() - begun, 1)}
    return found


def write_json(path: Path, content: Any) -> None:
    """In one step: a reader, or a kill, never meets half of it."""
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(content, indent=1) + "\n")
    beside.replace(path)


def run_all(stages: Sequence[Stage], command: Sequence[str], out: Path, seconds: float) -> dict[str, Any]:
    """Every stage within so many seconds altogether; DIR/summary.json after each."""
    out.mkdir(parents=True, exist_ok=True)
    begun, summary = time.monotonic(), {}
    for together in groups(stages):
        left = seconds - (time.monotonic() - begun)
        for name, how in run_together(together, command, out, left).items():
            summary[name] = how
            print(f"{name:28s} {how['state']:12s} {how['seconds']:6.1f} s", flush=True)
            write_json(out / "summary.json", summary)
    return summary


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "first_gpu")))
    parser.add_argument("--minutes", type=float, default=8.0, help="all stages together end within these")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help=f"of {', '.join(s.name for s in STAGES)}")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--standin", action="store_true")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.stage is not None:
        from bench import first_gpu_stages

        first_gpu_stages.run(options.stage, options.out, tiny=options.tiny, standin=options.standin)
        return 0
    unknown = set(options.only or ()) - {stage.name for stage in STAGES}
    if unknown:
        parser.error(f"--only must name stages, got {', '.join(sorted(unknown))}")
    stages = [stage for stage in STAGES if not options.only or stage.name in options.only]
    flags = ["--tiny"] * options.tiny + ["--standin"] * options.standin
    command = [sys.executable, "-m", "bench.first_gpu", "--out", str(options.out.resolve()), *flags]
    summary = run_all(stages, command, options.out.resolve(), 60 * options.minutes)
    return 0 if all(how["state"] == "ok" for how in summary.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
