"""What it costs to make a panel of a run durable: milliseconds of a commit, and its share of a run.

python -m bench.commit [--folder DIR]

A commit writes and syncs the panel's losses, the chain's state and a line of the log, and the folders of new names. Its
share is of a run with nothing automatic, of a small network on random data, by the run's own timings.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import lossk
from lossk.accumulate.panel import Panel
from lossk.accumulate.runlog import RunLog, commit_of
from lossk.samplers.chain import ChainState, Draw

SIZES = ((1_000, 10_000, 25), (10_000, 100_000, 25), (50_000, 1_000_000, 25))  # samples, weights, draws of a panel
PANELS = 12


def append(log: RunLog, part: Panel) -> None:
    """Make a panel durable, as a process alone does."""
    crcs = log.write_losses(part.chain, part.first_draw, part.losses)
    log.write_state(part.state, len(log.commits))
    log.commit([commit_of(part.chain, part.first_draw, part.state.step, part.draws, crcs)])


def measure(num_samples: int, num_weights: int, panel: int, folder: Path) -> dict[str, Any]:
    """Seconds of each of some commits, and the syncs of one."""
    counts = {"num_samples": num_samples, "num_chains": 1, "num_draws": (PANELS + 1) * panel, "panel": panel}
    log = RunLog.create(folder / f"{num_samples}.lossk", counts, {})
    losses, syncs, sync, seconds = torch.rand(panel, num_samples), [0], os.fsync, []

    def counting(descriptor: int) -> None:
        syncs[0] += 1
        sync(descriptor)

    os.fsync = counting
    try:
        for number in range(PANELS):
            first = number * panel
            draws = [Draw(0, first + i, 0.1, 0.1) for i in range(panel)]
            state = ChainState(0, first + panel, first + panel, torch.rand(num_weights))
            part = Panel(0, first, losses, draws, state)
            start = time.perf_counter()
            append(log, part)
            seconds.append(time.perf_counter() - start)
    finally:
        os.fsync = sync
        log.close()
    return {"seconds": sorted(seconds), "syncs": syncs[0] / PANELS}


def bare(num_bytes: int, folder: Path) -> float:
    """Seconds to write as many bytes to one file, and to sync it."""
    content, found = os.urandom(num_bytes), []
    for number in range(PANELS):
        start = time.perf_counter()
        with (folder / f"bare-{number}").open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def share(folder: Path, num_samples: int = 5_000) -> str:
    """Of 4 chains of 50 draws of a network of 100,000 weights, and of its whole store."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(num_samples, 64, generator=generator), torch.arange(num_samples) % 10
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 512), torch.nn.ReLU(), torch.nn.Linear(512, 128), torch.nn.Linear(128, 10)
    )
    sampler = lossk.SGLD(lr=1e-4, n_beta=100.0, localization=100.0, num_burnin_steps=50, num_steps_bw_draws=10)
    kernel = lossk.build_kernel(
        model, data, sampler=sampler, num_draws=50, tile=1024, panel=25, out=folder / "share.lossk", progress=False,
        passes=lossk.Passes(),
    )  # fmt: skip
    timings = kernel.meta["timings"]
    part = timings["store"] / timings["total"]
    return f"{timings['store']:.3f} s of {timings['total']:.2f} s, {part:.1%}, for 8 commits"


def row(num_samples: int, num_weights: int, panel: int, folder: Path) -> str:
    found = measure(num_samples, num_weights, panel, folder)
    least, middle, most = (found["seconds"][round(q * (PANELS - 1))] for q in (0.2, 0.5, 0.8))
    written = 4 * (num_samples * panel + num_weights)
    floor = bare(written, folder)
    return (
        f"| {num_samples:,} | {num_weights:,} | {written / 1e6:.2f} | {found['syncs']:.1f} | {1e3 * middle:.1f} "
        f"({1e3 * least:.1f} to {1e3 * most:.1f}) | {1e3 * floor:.1f} |"
    )


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, help="on the disk that is asked about; default: the system's temporary one"
    )
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    print("| samples | weights | MB | syncs | commit, ms (20 to 80 %) | one write and sync, ms |\n" + "|---" * 6 + "|")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for size in SIZES:
            print(row(*size, Path(folder)), flush=True)
        print(share(Path(folder)))


if __name__ == "__main__":
    main()
