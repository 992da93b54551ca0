"""What preparation costs beside the run, in seconds and in memory, of networks with some ten million weights.

python -m bench.preparation [--quick] [--out docs/preparation.md]

Each case is a process of its own, a call of `build_kernel` with few draws: of a causal transformer's and a vision
transformer's every weight or last block, with every setting "auto" or a number. Preparation is everything before the
first step of the run: reading, checks, losses at w*, pilots and trial chains.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import lossk
from bench.late_blocks import WORDS, Blocks, Patches, losses
from bench.machine import ROOT, environment
from bench.markdown import table
from bench.memory_watch import MemoryWatch
from lossk.timings import duration

PREPARING = ("prepare", "check", "prefix", "pilot", "fit", "anchor", "plan")
SIZES = {"full": (512, 6, 64, 25), "quick": (256, 4, 32, 10), "tiny": (16, 2, 12, 2)}  # width, blocks, samples, draws
NETWORKS, PARTS, SETTINGS = ("decoder", "vision transformer"), ("whole", "late"), ("auto", "numbers")


class FirstLine:
    """Stands for stderr: notes when the first line was written."""

    def __init__(self) -> None:
        self.start, self.at = time.perf_counter(), float("nan")

    def write(self, text: str) -> int:
        if self.at != self.at and text.strip():
            self.at = time.perf_counter() - self.start
        return len(text)

    def flush(self) -> None: ...


def measure(network: str, part: str, settings: str, size: str) -> dict[str, Any]:
    """One case, in this process."""
    width, depth, count, draws = SIZES[size]
    torch.manual_seed(0)
    causal, numbers = network == "decoder", torch.Generator().manual_seed(0)
    if causal:
        ids = torch.randint(0, WORDS, (count, 32), generator=numbers, device="cpu")
        model, data = Blocks(torch.nn.Embedding(WORDS, width), width, depth, WORDS, causal=True), (ids, ids.roll(-1, 1))
    else:
        images = torch.rand(count, 3, 32, 32, generator=numbers, device="cpu")
        model = Blocks(Patches(width), width, depth, 10, causal=False)
        data = (images, torch.arange(count, device="cpu") % 10)
    params = [f"blocks.{depth - 1}.*"] if part == "late" else None
    given: dict[str, Any] = {"lr": 1e-7, "localization": 100.0, "num_burnin_steps": 10, "num_steps_bw_draws": 4}
    sampler = lossk.SGLD(params=params, batch_size=16, **given) if settings == "numbers" else lossk.SGLD(params=params)
    first, stderr = FirstLine(), sys.stderr
    watch = MemoryWatch()
    sys.stderr = first  # type: ignore[assignment]
    try:
        kernel = lossk.build_kernel(model, data, loss=losses, sampler=sampler, num_chains=2, num_draws=draws)
    finally:
        sys.stderr = stderr
    memory = watch.bytes()
    timings = kernel.meta["timings"]
    before = sum(timings.get(stage, 0.0) for stage in PREPARING)
    return {
        "network": network,
        "part": part,
        "settings": settings,
        "weights": sum(p.numel() for p in model.parameters()),
        "first_line": first.at,
        "preparation": before,
        "run": timings["total"] - before,
        "stages": {stage: timings[stage] for stage in PREPARING if stage in timings},
        "peak": memory["above"],
        "planned": kernel.meta["memory"]["planned_peak_bytes"],
        "rough": any(why.startswith("pilot = rough") for why in kernel.meta["reasons"]),
        "verdict": None if kernel.diagnostics is None else kernel.diagnostics.verdict,
    }


def page(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = []
    for row in rows:
        share = row["preparation"] / row["run"]
        lines.append([row["network"], f"{row['weights'] / 1e6:.1f} M", row["part"], row["settings"],
                      f"{row['first_line']:.1f} s", duration(row["preparation"]), duration(row["run"]),
                      f"{share:.0%}", f"{row['peak'] / 2**20:.0f} MB", f"{row['planned'] / 2**20:.0f} MB",
                      f"{row['peak'] / (4 * row['weights']):.1f}", "yes" if row["rough"] else ""])  # fmt: skip
    head = ["network", "weights", "sampled", "settings", "first line", "preparation", "run", "share", "peak",
            "planned", "peak / weights", "rough"]  # fmt: skip
    machine = environment(torch.get_num_threads())
    said = (
        "`python -m bench.preparation --out docs/preparation.md`: 2 chains of few draws; weights are random.",
        "*Preparation* is everything before the first step of the run. *Peak* is what the call added to the process's",
        "memory, *peak / weights* that over the bytes of all weights in float32.",
    )
    return (
        "# What preparation costs\n\n"
        + "\n".join(said)
        + "\n\n"
        + table(head, lines)
        + f"\n\n{machine['device']}, {machine['threads']} thread(s), load {machine['load_average']}; git "
        f"{machine['git_sha']}.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size = "quick" if options.quick else "full"
    if options.one:
        print(json.dumps(measure(*options.one, size)))
        return
    rows = []
    for case in ((n, p, s) for n in NETWORKS for p in PARTS for s in SETTINGS):
        words = [sys.executable, "-m", "bench.preparation", *sys.argv[1:], "--one", *case]
        rows.append(json.loads(subprocess.run(words, check=True, capture_output=True, text=True, cwd=ROOT).stdout))
        print(*case, f"{rows[-1]['preparation']:.1f} s of {rows[-1]['run']:.1f} s", file=sys.stderr, flush=True)
    text = page(rows)
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
