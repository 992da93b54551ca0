"""One rank of `bench.scaling`, pinned to one core: it builds the kernel, and rank 0 prints a record."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path

import torch
import zarr

import lossk
from bench.fifty_thousand import SAMPLER
from lossk.provenance import peak_rss_bytes
from lossk.recipes import fashion


def main(store: Path, checkpoint: Path, num_samples: int, num_chains: int, num_draws: int, num_train: int) -> None:
    rank = int(os.environ["RANK"])
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["LOCAL_RANK"]) % len(cores)]})
    torch.set_num_threads(1)
    task = fashion.make_task(num_probe=1000, checkpoint=checkpoint)
    x, y = task.train
    train = x[:num_train], y[:num_train]
    start, worked = time.perf_counter(), time.process_time()
    kernel = lossk.build_kernel(
        task.model, (x[:num_samples], y[:num_samples]), train=train, sampler=SAMPLER, num_chains=num_chains,
        num_draws=num_draws, panel=10, tile=1024, out=store, passes=lossk.Passes(), progress=False,
    )  # fmt: skip
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - worked
    print("cpu " + json.dumps(cpu_seconds), flush=True)
    if rank == 0:
        losses = zarr.open_array(str(store / "losses"), mode="r")[...]
        found = {
            "seconds": seconds,
            "timings": kernel.meta["timings"],
            "ranks": kernel.meta.get("ranks", {"size": 1, "rows": 1, "shards": 1}),
            "peak_rss_bytes": peak_rss_bytes(),
            "losses": hashlib.sha256(losses.tobytes()).hexdigest(),
            "cores": len(cores),
            "steps": SAMPLER.steps(num_draws),
        }
        print("record " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:7]))
