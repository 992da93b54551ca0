"""The kernel of 50,000 Fashion-MNIST training images, its tiles in memory or, with --memory, made in the store.

    python -m bench.fifty_thousand --store FILE.lossk [--memory 900MB] [--checkpoint CNN.pt]

The sampler's settings are BAOAB's for this network, given as numbers, so that only the engine is measured.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import psutil
import torch

import lossk
from bench.machine import environment
from lossk.provenance import peak_rss_bytes
from lossk.recipes import fashion

NUM_SAMPLES = 50_000
SAMPLER = lossk.BAOAB(
    n_beta=5454.0,
    localization=30_130.0,
    step_size=0.0021,
    friction=300.0,
    num_burnin_steps=20,
    num_steps_bw_draws=4,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True, help="a new store: 5 GB")
    parser.add_argument("--memory", help="see build_kernel; tiles are made in the store where they do not fit")
    parser.add_argument("--checkpoint", type=Path, help="the network, read or written; else it is trained")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    task = fashion.make_task(num_probe=1000, checkpoint=options.checkpoint)
    x, y = task.train
    process = psutil.Process()
    before, start, held = process.io_counters(), time.perf_counter(), process.memory_info().rss
    kernel = lossk.build_kernel(
        task.model,
        (x[:NUM_SAMPLES], y[:NUM_SAMPLES]),
        train=task.train,
        sampler=SAMPLER,
        num_chains=4,
        num_draws=50,
        tile=2048,
        out=options.store,
        memory=options.memory,
    )
    seconds, after = time.perf_counter() - start, process.io_counters()
    machine = environment(options.threads)
    stages = ", ".join(f"{name} {value:.1f} s" for name, value in kernel.meta["timings"].items() if value >= 0.05)
    print(
        f"{NUM_SAMPLES:,} images, 4 x 50 draws, tiles in {kernel.meta['memory']['tiles']}: {seconds:.0f} s ({stages}); "
        f"peak of the whole process {peak_rss_bytes() / 1e9:.2f} GB, {held / 1e9:.2f} GB of it before the call; "
        f"{(after.write_bytes - before.write_bytes) / 1e9:.2f} GB written for a triangle of "
        f"{2 * NUM_SAMPLES**2 / 1e9:.1f} GB; {machine['device']}, {options.threads} thread(s), git {machine['git_sha']}"
    )


if __name__ == "__main__":
    main()
