"""One call of `bench.interop`, timed in a process of its own; runs in a peer's Python too.

PYTHON -m bench.interop_call SPEC.json   prints one line of JSON
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.memory_watch import MemoryWatch


def tree(spec: dict[str, Any]) -> Any:
    """Losses of `num_samples` sequences of one token at so many draws: groups that share a factor."""
    import xarray as xr

    generator = np.random.default_rng(0)
    chains, draws, n = spec["num_chains"], spec["num_draws"], spec["num_samples"]
    losses = generator.standard_normal((chains, draws, n, 1), dtype=np.float32)
    losses += generator.standard_normal((chains, draws, 10, 1), dtype=np.float32)[:, :, np.arange(n) % 10]
    losses += np.float32(2.0)
    ids = np.zeros((n, 2), dtype=np.int64)
    variables = {
        "loss_a": (("chain", "draw", "batch_a", "token_pos"), losses),
        "input_ids_a": (("batch_a", "token"), ids),
    }
    return xr.DataTree(xr.Dataset(variables))


def influence(spec: dict[str, Any]) -> Any:
    """The call: `compute_bif` of that tree."""
    if spec["who"] == "theirs":
        from devinterp.slt.bif import compute_bif
    else:
        from lossk.interop.devinterp import compute_bif
    samples = tree(spec)

    def call() -> np.ndarray:
        found = compute_bif(samples, correlation_method="sequence")
        return found["influences"].values

    return call


def step(spec: dict[str, Any]) -> Any:
    """The call: a hundred SGLD steps of a network's parameters, by an optimizer of devinterp 1.3's kind."""
    if spec["who"] == "theirs":
        from devinterp.optim.sgmcmc import SGMCMC

        make = SGMCMC.sgld
    else:
        from lossk.interop.devinterp import sgld as make  # type: ignore[assignment]
    width = spec["width"]
    layers = (torch.nn.Linear(64, width), torch.nn.Linear(width, width), torch.nn.Linear(width, 10))
    parameters = [p for layer in layers for p in layer.parameters()]
    for p in parameters:
        p.grad = torch.full_like(p, 1e-3)
    optimizer = make(parameters, lr=1e-6, nbeta=100.0, localization=10.0)

    def call() -> np.ndarray:
        for _ in range(100):
            optimizer.step()
        return parameters[0].detach().numpy()

    return call


def main(path: str) -> None:
    warnings.simplefilter("ignore")
    spec = json.loads(Path(path).read_text())
    torch.set_num_threads(1)
    call = {"influence": influence, "step": step}[spec["call"]](spec)
    watch = MemoryWatch()
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    found = {"seconds": wall, "cpu_seconds": cpu, "peak_bytes": watch.bytes()["above"], "shape": list(result.shape)}
    package = "devinterp" if spec["who"] == "theirs" else "lossk"
    found["made_by"] = f"{package} {version(package)}, torch {torch.__version__}"
    if spec["call"] == "influence":
        found["corner"] = result[:20, :20].tolist()
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
