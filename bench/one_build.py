"""One `build_kernel` in a process of its own: seconds per stage and peak memory, as one JSON line.

    python -m bench.one_build '{"num_samples": 8000, "num_draws": 16, ...}'

The network is an MLP 16-width-10 with random weights on random data: what it knows costs neither time nor memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

import lossk
from bench.machine import ROOT
from bench.memory_watch import MemoryWatch


@dataclass(frozen=True)
class Point:
    """What is built."""

    num_samples: int
    num_chains: int = 2
    num_draws: int = 16
    width: int = 16
    threads: int = 1

    @property
    def num_weights(self) -> int:
        return 17 * self.width + (self.width + 1) * 10


def build(point: Point) -> dict[str, Any]:
    """Build once, here: {"above", "peak", "before" in bytes, "timings" in seconds}."""
    torch.set_num_threads(point.threads)
    torch.manual_seed(0)
    x, y = torch.randn(point.num_samples, 16), torch.randint(0, 10, (point.num_samples,))
    model = nn.Sequential(nn.Linear(16, point.width), nn.ReLU(), nn.Linear(point.width, 10))
    sampler = lossk.SGLD(
        lr=1e-6, n_beta=100.0, localization=100.0, batch_size=256, num_burnin_steps=0, num_steps_bw_draws=1
    )
    watch = MemoryWatch()
    kernel = lossk.build_kernel(
        model, (x, y), sampler=sampler, num_chains=point.num_chains, num_draws=point.num_draws, progress=False
    )
    return {**watch.bytes(), "timings": kernel.meta["timings"]}


def elsewhere(point: Point) -> dict[str, Any]:
    """Build once in a new process.

    Raises:
        RuntimeError: with what it printed, if it fails.
    """
    done = subprocess.run(
        [sys.executable, "-m", "bench.one_build", json.dumps(asdict(point))], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"the build of {point} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


if __name__ == "__main__":
    print(json.dumps(build(Point(**json.loads(sys.argv[1])))))
