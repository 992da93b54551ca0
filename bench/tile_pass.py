"""The tiles of an out-of-core build made from a log of synthetic draws: what the pass costs, and its products alone.

python -m bench.tile_pass [--num-samples 50000] [--num-draws 50] [--memory-mb 600] [--folder DIR]

Four chains whose samples share ten signals, float32 tiles. Needs 2 N^2 bytes of disk in the folder (a temporary one,
removed at the end). Processor seconds are of the whole process and of the thread that multiplies; the other thread
compresses and writes, so that with a second core the pass takes about as long as the longer of the two.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.commit import append
from bench.machine import environment
from bench.memory_watch import MemoryWatch
from bench.options import Found
from lossk.accumulate.panel import Panel
from lossk.accumulate.runlog import RunLog
from lossk.accumulate.tile_pass import OutOfCore
from lossk.accumulate.tiles import add_rows
from lossk.forms.blocks import tile_spans
from lossk.plan.layout import Size, log_columns, widest_in_store
from lossk.samplers.chain import ChainState, Draw

SIGNALS = 10
CHAINS = 4


@dataclass(frozen=True)
class Pass:
    """What is made, and within how much memory."""

    num_samples: int = 50_000
    num_draws: int = 50  # per chain
    tile: int = 2048
    panel: int = 25
    memory_bytes: int = 600_000_000

    @property
    def request(self) -> dict[str, Any]:
        """Of the run whose log it is."""
        counts = {"num_samples": self.num_samples, "num_chains": CHAINS, "num_draws": self.num_draws}
        return {**counts, "tile": self.tile, "panel": self.panel, "dtype": "float32"}


def losses_of(made: Pass, chain: int, count: int) -> Tensor:
    """Some draws of a chain: [k, N] float32, nats."""
    generator = torch.Generator().manual_seed(chain)
    signals = torch.randn(SIGNALS, made.num_samples, generator=torch.Generator().manual_seed(CHAINS))
    losses = torch.randn(count, made.num_samples, generator=generator)
    losses += torch.randn(count, SIGNALS, generator=generator) @ signals / SIGNALS**0.5
    return 1 + 0.01 * losses


def write_log(made: Pass, path: Path) -> RunLog:
    """The log of a run whose draws are all there."""
    log = RunLog.create(path, made.request, {}, log_columns(made.num_samples, made.tile))
    for chain in range(CHAINS):
        losses = losses_of(made, chain, made.num_draws)
        for first in range(0, made.num_draws, made.panel):
            part = losses[first : first + made.panel]
            draws = [Draw(chain, first + i, 0.0, 0.0) for i in range(len(part))]
            state = ChainState(chain, first + len(part), first + len(part), torch.zeros(1))
            append(log, Panel(chain, first, part, draws, state))
    return log


def measure(made: Pass, folder: Path) -> Found:
    log = write_log(made, folder / "pass.lossk")
    watch = MemoryWatch()
    layout = widest_in_store(Size(**made.request, num_weights=1), 0, made.memory_bytes, None)
    sums = OutOfCore(
        log, made.num_samples, made.tile, num_chains=CHAINS, num_draws=made.num_draws, centering="chain",
        dtype="float32", layout=layout, cache_bytes=0,
    )  # fmt: skip
    for commit in log.commits:
        sums.update(commit.chain, log.read_panel(commit))
    seconds = timed(lambda: sums.finalize())
    log.close()
    chunks = [file for file in (folder / "pass.lossk" / "tiles" / "c").rglob("*") if file.is_file()]
    return {
        "pass": asdict(made),
        "layout": asdict(layout),
        "tiles": len(chunks),
        "bytes": sum(file.stat().st_size for file in chunks),
        "memory": watch.bytes()["above"],
        "seconds": seconds,
        "products": timed(lambda: products(made)),
    }


def timed(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds by the clock, of this process's threads, of them in the system, and of this thread."""
    clocks: dict[str, Callable[[], float]] = {
        "clock": time.perf_counter,
        "process": time.process_time,
        "system": lambda: os.times().system,
        "thread": time.thread_time,
    }
    before = {name: clock() for name, clock in clocks.items()}
    work()
    return {name: clock() - before[name] for name, clock in clocks.items()}


def products(made: Pass) -> None:
    """The floor: as many products of the same shapes, of rows in memory, into one tile that is never read."""
    spans = tile_spans(made.num_samples, made.tile)
    rows = torch.randn(CHAINS * made.num_draws, spans[0].stop)
    for i, above in enumerate(spans):
        for j, span in enumerate(spans[i:], i):
            left, right = rows[:, : above.stop - above.start], rows[:, : span.stop - span.start]
            add_rows(torch.zeros(left.shape[1], right.shape[1]), (i, j), left, right)


def section(found: Found) -> str:
    made, seconds, floor = found["pass"], found["seconds"], found["products"]
    size = 2 * made["num_samples"] ** 2
    return (
        f"{made['num_samples']:,} samples, {CHAINS} x {made['num_draws']} draws, {found['tiles']} tiles of "
        f"{made['tile']:,}: {seconds['process']:.2f} s of processor ({seconds['system']:.2f} s in the system), "
        f"{seconds['thread']:.2f} s of them in the thread that multiplies ({seconds['clock']:.2f} s by the clock); "
        f"the products alone {floor['process']:.2f} s; "
        f"{found['bytes'] / 1e9:.2f} GB written for a triangle of {size / 1e9:.2f} GB; "
        f"{found['memory'] / 1e6:.0f} MB above the start, {found['layout']['stripes']} tile rows at a time"
    )


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Pass()
    for name in ("num_samples", "num_draws", "tile", "panel"):
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=getattr(default, name))
    parser.add_argument("--memory-mb", type=int, default=default.memory_bytes // 10**6, help="as memory=")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where tiles are written; default: the system's temporary one")
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    machine = environment(options.threads)
    made = Pass(
        options.num_samples, options.num_draws, options.tile, options.panel, memory_bytes=options.memory_mb * 10**6
    )
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = measure(made, Path(folder))
    print(section(found))
    print(
        f"{machine['device']}, {options.threads} thread(s), load before {machine['load_average']}, "
        f"git {machine['git_sha'][:9]}"
    )


if __name__ == "__main__":
    main()
