"""The stages of `bench.first_gpu`, each in a process of its own; what is found is written as soon as it is known."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lossk
from bench import gpu, gpu_build, gpu_cases, gpu_forward
from bench.first_gpu import file_of, write_json
from lossk import provenance
from lossk.device import settle
from lossk.ops import triton_kernels

Write = Callable[[dict[str, Any]], None]
NEEDED = ("numpy", "scipy", "psutil", "tqdm", "yaml", "triton", "arviz_stats", "numcodecs", "google_crc32c", "zarr")


@dataclasses.dataclass(frozen=True)
class Bench:
    """What a stage is given."""

    device: torch.device
    tiny: bool
    write: Write


def run(name: str, out: Path, *, tiny: bool, standin: bool) -> None:
    """One stage; "seconds" is added to what it has written."""
    function, _, argument = name.partition(":")
    known: dict[str, Any] = {}

    def write(found: dict[str, Any]) -> None:
        known.update(found)
        write_json(file_of(out, name, "json"), known)

    begun = time.monotonic()
    with contextlib.ExitStack() as around:
        if standin:
            from tests.cuda_standin import StandIn

            around.enter_context(StandIn())
        bench = Bench(torch.device("cuda"), tiny, write)
        STAGES[function](bench, *filter(None, [argument]))
    write({"seconds": round(time.monotonic() - begun, 2)})


def versions(bench: Bench) -> None:
    """Of everything, and what is missing."""
    bench.write({"missing": [name for name in NEEDED if importlib.util.find_spec(name) is None]})
    bench.write({"versions": provenance.versions(), "git_sha": provenance.git_sha(), "python": sys.version})
    properties = torch.cuda.get_device_properties(bench.device)
    free, total = torch.cuda.mem_get_info(bench.device)
    bench.write({
        "device": torch.cuda.get_device_name(bench.device), "processors": properties.multi_processor_count,
        "capability": [properties.major, properties.minor], "free_bytes": free, "bytes": total,
        "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
    })  # fmt: skip
    bench.write({"sum": float(torch.ones(1000, device=bench.device).sum())})


def self_test(bench: Bench, op: str) -> None:
    """One kernel, compiled and compared with the reference."""
    found = triton_kernels.status(op, bench.device)
    bench.write({"available": found.available, "reason": found.reason})
    if not found.available:
        raise SystemExit(f"{op}: {found.reason}")


def problem(bench: Bench) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Images of three classes, and a small convolutional network."""
    torch.manual_seed(0)
    count = 24 if bench.tiny else 2000
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 3)
    )
    return model, (torch.randn(count, 3, 12, 12), torch.arange(count) % 3)


def given(bench: Bench, **changes: Any) -> dict[str, Any]:
    """Settings of a small build, in which nothing is chosen by the clock."""
    sampler = lossk.SGLD(
        lr=1e-4, n_beta=100.0, localization=10.0, batch_size=16, num_burnin_steps=4, num_steps_bw_draws=2
    )
    draws = 3 if bench.tiny else 40
    settings: dict[str, Any] = {
        "sampler": sampler, "num_chains": 2, "num_draws": draws, "tile": 512, "passes": lossk.Passes(),
        "progress": False, "backend": "torch" if bench.tiny else "auto",
    }  # fmt: skip
    return settings | changes


def small_build(bench: Bench) -> None:
    """On the device and on the CPU: the largest difference of an entry, by the largest entry."""
    model, data = problem(bench)
    expected = lossk.build_kernel(model, data, **given(bench, backend="torch")).to_numpy()
    for precision in (None, "tf32", "bf16"):
        kernel = lossk.build_kernel(model, data, device=bench.device, precision=precision, **given(bench))
        kernel.neighbors(k=3)
        off = float(abs(kernel.to_numpy() - expected).max() / abs(expected).max())
        bench.write({
            str(precision): {
                "off_by": off, "ops": kernel.meta["ops"], "passes_reasons": kernel.meta["passes_reasons"],
                "timings": kernel.meta["timings"], "memory": kernel.meta["memory"],
            }
        })  # fmt: skip


def repeat(bench: Bench) -> None:
    """Whether two calls give the same bits: as torch is, and with its deterministic algorithms."""
    model, data = problem(bench)

    def build() -> Any:
        return lossk.build_kernel(model, data, device=bench.device, **given(bench)).to_numpy()

    first, second = build(), build()
    bench.write({"default": {"same": bool((first == second).all()), "off_by": float(abs(first - second).max())}})
    torch.use_deterministic_algorithms(True)
    try:
        first, second = build(), build()
    finally:
        torch.use_deterministic_algorithms(False)
    bench.write({"deterministic": {"same": bool((first == second).all()), "off_by": float(abs(first - second).max())}})


def default_sampler(bench: Bench) -> None:
    """`SGLD()` with nothing given: the call of a first user."""
    model, data = problem(bench)
    few = {"num_chains": 1, "num_draws": 3, "backend": "torch"} if bench.tiny else {"num_chains": 4, "num_draws": 50}
    kernel = lossk.build_kernel(model, data, device=bench.device, progress=not bench.tiny, **few)
    bench.write({key: kernel.meta[key] for key in ("sampler", "reasons", "passes", "passes_reasons", "timings", "ops")})
    bench.write({"diagnostics": str(kernel.diagnostics)})
    kernel.neighbors(k=3)


def ops(bench: Bench) -> None:
    """Each kernel against torch and the device's limits (`bench.gpu`), few sizes of each."""
    of = gpu.limits(bench.device, 16, 2**10) if bench.tiny else gpu.limits(bench.device)
    bench.write({"limits": of})
    few = {"ranks": (64, 256, 1024), "parameters": (25_000_000, 250_000_000)}
    sizes = gpu_cases.TINY if bench.tiny else dataclasses.replace(gpu_cases.Sizes(), **few)  # type: ignore[arg-type]
    gpu.measure_ops(sizes, bench.device, of, bench.write)


def forward(bench: Bench) -> None:
    """Variants of the probe's forward pass."""
    sizes = gpu_forward.TINY_FORWARD if bench.tiny else gpu_forward.ForwardSizes()
    gpu_forward.measure(sizes, bench.device, bench.write)


def large_build(bench: Bench) -> None:
    """The build of 50,000 images by stages: first of few of them, so that something is known in any case."""
    whole = gpu_build.TINY_BUILD if bench.tiny else gpu_build.BuildSizes(draws=2)
    few = dataclasses.replace(whole, images=min(whole.images, 5000))
    timed = partial(_seconds, device=bench.device)
    for name, sizes in (("few", few), ("all", whole)):
        bench.write({name: gpu_build.measure(sizes, bench.device, timed)})


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    settle(device)
    return statistics.median(gpu.milliseconds(call, device, rounds=5)) / 1e3


STAGES: dict[str, Callable[..., None]] = {
    function.__name__: function
    for function in (versions, self_test, small_build, repeat, default_sampler, ops, forward, large_build)
}
