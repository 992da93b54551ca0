"""The rank-k update of the kernel's triangle against torch.mm's peak, and its share of a run.

python -m bench.rank_update [--quick]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.end_to_end import ours
from bench.jobs import make_mlp
from bench.markdown import seconds, table
from bench.options import Found, Options, run_alone
from bench.sgld_step import time_cases
from lossk.accumulate.tiles import TileAccumulator
from lossk.forms.blocks import tile_spans, upper_triangle
from lossk.ops.rank_update import rank_update

PEAK = "torch.mm"


@dataclass(frozen=True)
class Sizes:
    num_samples: int
    tile: int
    peak: int  # side of torch.mm's square matrices
    panels: tuple[int, ...]  # draws per update
    time: float  # seconds


def measure(options: Options) -> Found:
    sizes = options.pick(
        full=Sizes(8192, 4096, 4096, (16, 64, 128, 256, 512), 40.0),
        quick=Sizes(4096, 2048, 1024, (16, 128), 2.0),
        tiny=Sizes(64, 32, 32, (4,), 0.0),
    )
    cases, flops = make_cases(sizes)
    times = time_cases(cases, sizes.time, least=3)
    turn = ours(make_mlp(options))()
    return {
        "sizes": vars(sizes),
        "times": times,
        "gflops": {name: 1e-6 * flops[name] / each["median_ms"] for name, each in times.items()},
        "share": turn["stage update"] / turn["seconds"],
    }


def make_cases(sizes: Sizes) -> tuple[dict[str, Callable[[], object]], dict[str, float]]:
    """The cases, and the floating-point operations that each one has to do."""
    side = sizes.peak
    a, b, out = torch.randn(side, side), torch.randn(side, side), torch.empty(side, side)
    cases: dict[str, Callable[[], object]] = {PEAK: lambda: torch.mm(a, b, out=out)}
    flops = {PEAK: 2.0 * side**3}
    spans = tile_spans(sizes.num_samples, sizes.tile)
    tiles = {
        (i, j): torch.zeros(spans[i].stop - spans[i].start, spans[j].stop - spans[j].start)
        for i, j in upper_triangle(len(spans))
    }

    def products(rows: Tensor) -> Callable[[], object]:
        def run() -> None:
            for (i, j), tile in tiles.items():
                rank_update(tile, rows[:, spans[i]], rows[:, spans[j]])

        return run

    def panels(panel: Tensor) -> Callable[[], object]:
        # One chain that never ends: closing it would need a given number of draws.
        accumulator = TileAccumulator(sizes.num_samples, sizes.tile, num_chains=1, num_draws=2**40)
        return lambda: accumulator.update(0, panel)

    for count in sizes.panels:
        rows = torch.randn(count, sizes.num_samples)
        for name, case in ((f"products, {count} draws", products(rows)), (f"panel, {count} draws", panels(rows))):
            cases[name], flops[name] = case, float(sizes.num_samples) ** 2 * count
    return cases, flops


def section(found: Found) -> str:
    sizes, peak = found["sizes"], found["gflops"][PEAK]
    names = {PEAK: f"{PEAK}, {sizes['peak']} x {sizes['peak']}"}
    rows = [
        [
            names.get(name, name),
            *(seconds(1e-3 * each[key]) for key in ("median_ms", "p20_ms", "p80_ms")),
            f"{found['gflops'][name]:,.0f}",
            f"{found['gflops'][name] / peak:.0%}",
        ]
        for name, each in found["times"].items()
    ]
    head = ["", "median", "20 %", "80 %", "GFLOP/s", "of torch.mm"]
    title = f"## Rank-k update, N = {sizes['num_samples']:,}, tiles of {sizes['tile']:,}"
    share = f"Its share of the MLP's run: **{found['share']:.1%}** (target: under 3 %)."
    return "\n\n".join([title, table(head, rows), f"{share} That of the CNN's is under *Where the time goes*.", HOW])


HOW = """N^2 k operations are counted, those of the triangle, though *products* computes tiles on the diagonal whole.
*Products* are the matrix products alone (`lossk.ops.rank_update` over all tiles), *panel* is what a run pays:
statistics and centering in float64, scaling, products. Cases take turns."""


if __name__ == "__main__":
    run_alone(measure, section, __doc__)
