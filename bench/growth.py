"""How time per stage and peak memory grow with samples, draws and weights; one process per point.

python -m bench.growth [--quick]
"""

from __future__ import annotations

import sys
from dataclasses import asdict, replace

import psutil

from bench.markdown import megabytes, seconds, table
from bench.one_build import Point, elsewhere
from bench.options import Found, Options, run_alone

STAGES = ("anchor", "fit", "pilot", "gradient", "step", "probe", "update")
HEADROOM = 0.7  # of the free memory that a kernel's triangle may take here


def points(options: Options) -> dict[str, list[Point]]:
    """For each thing that grows, its points; the rest stays small."""
    base = Point(num_samples=options.pick(full=2000, quick=1000, tiny=64), threads=options.threads)
    samples = options.pick(full=(1000, 2000, 5000, 10_000, 20_000, 50_000), quick=(1000, 4000), tiny=(64,))
    draws = options.pick(full=(16, 64, 256, 1024), quick=(16, 64), tiny=(4,))
    widths = options.pick(full=(16, 256, 4096, 65_536), quick=(16, 4096), tiny=(4,))
    return {
        "samples": [replace(base, num_samples=count) for count in samples],
        "draws per chain": [replace(base, num_draws=count) for count in draws],
        "weights": [replace(base, width=width) for width in widths],
    }


def measure(options: Options) -> Found:
    found: Found = {}
    for what, wanted in points(options).items():
        found[what] = []
        for point in wanted:
            print(f"growth with {what}: {point}", file=sys.stderr, flush=True)
            left_out = 2 * point.num_samples**2 > HEADROOM * psutil.virtual_memory().available
            built = {"left out": True} if left_out else elsewhere(point)
            found[what].append({"point": {**asdict(point), "num_weights": point.num_weights}, **built})
    return found


def section(found: Found) -> str:
    key = {"samples": "num_samples", "draws per chain": "num_draws", "weights": "num_weights"}
    parts = ["## Growth"]
    for what, each in found.items():
        head = [what, *STAGES, "other", "total", "peak memory above the start"]
        parts += [f"### With the number of {what}", table(head, [row(key[what], one) for one in each])]
    return "\n\n".join([*parts, HOW])


def row(key: str, found: Found) -> list[str]:
    first = f"{found['point'][key]:,}"
    if "left out" in found:
        return [first, *["" for _ in STAGES], "", "left out: too little memory free here", ""]
    timings = found["timings"]
    stages = [timings.get(stage, 0.0) for stage in STAGES]
    rest = timings["total"] - sum(stages)
    return [first, *map(seconds, stages), seconds(rest), seconds(timings["total"]), megabytes(found["above"])]


HOW = """One `build_kernel` per row, once, in a process of its own: an MLP 16-width-10, 2 chains, 16 draws of one step
each unless draws grow, minibatches of 256. *Other* is reading and checking, restoring, diagnostics, and what is loaded
on first use. Single runs: read the trend, not the digits."""


if __name__ == "__main__":
    run_alone(measure, section, __doc__)
