"""Each Triton kernel on a GPU, against the same work in torch, its peers, and the device's own limits, in one run.

    python -m bench.gpu [--out bench/results/gpu.json] [--part ops|build]

The limits are measured, not read from a data sheet: bandwidth by copying 1 GiB, FLOP rate by torch.mm of 8192 x 8192 in
the case's precision. A case's limit is its bytes at the copy rate or its flops at its precision's rate, whichever takes
longer, so a rank-k update of few rows is held to the memory it moves. Times are medians with 20/80 percentiles, after
warm-up, of calls that are repeated until launching them is a small part. A contender that fails is recorded with its
error, ours too, and the record is written after every case. Then a kernel of 50,000 synthetic images under a network of
GoogLeNet's size, split into forward, gradient, step and update, with what 1,000 draws would take.
Peers (quack-kernels, liger-kernel, cut-cross-entropy) take part where they are installed. Targets are printed as met or
missed. Where there is no GPU it refuses; `--tiny` runs everything in Triton's interpreter at sizes that say nothing of
speed, so that this file cannot rot.

This file has never run on a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import gpu_build, gpu_cases
from bench.gpu_targets import judge
from lossk import provenance
from lossk.device import peak_bytes

ENOUGH, MOST_CALLS = 5.0, 100  # ms that calls timed together take, and how many they are at most


def milliseconds(run: Callable[[], object], device: torch.device, rounds: int = 20) -> list[float]:
    """Times of a call by the device's own clock, after calls to warm up; on a CPU by the wall's, once."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return [1e3 * (time.perf_counter() - start)]
    run()
    calls = min(math.ceil(ENOUGH / max(_together(run, 3) / 3, 1e-3)), MOST_CALLS)
    return sorted(_together(run, calls) / calls for _ in range(rounds))


def _together(run: Callable[[], object], calls: int) -> float:
    """Milliseconds of so many calls, one launched after the other."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def limits(device: torch.device, side: int = 8192, copied: int = 2**28) -> dict[str, float]:
    """ "copy": bytes per second; a precision: flops per second of torch.mm in it, all measured."""
    source = torch.rand(copied, device=device)
    found = {"copy": 2 * 4 * copied / statistics.median(milliseconds(lambda: source.clone(), device)) * 1e3}
    before = torch.get_float32_matmul_precision()
    for precision in ("bf16", "tf32", "fp32"):
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        square = torch.randn(side, side, device=device).to(torch.bfloat16 if precision == "bf16" else torch.float32)
        took = statistics.median(milliseconds(lambda x=square: x @ x, device))  # type: ignore[misc]
        found[precision] = 2 * side**3 / took * 1e3
    torch.set_float32_matmul_precision(before)
    found["tf32x3"] = found["tf32"] / 3  # three products of tf32 for one
    return found


def time_case(case: gpu_cases.Case, of: dict[str, float], device: torch.device) -> dict[str, Any]:
    """A case's row; a contender that fails says why."""
    try:
        peak = peak_bytes(device, case.run)
        times = milliseconds(case.run, device)
    except Exception as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        print(f"{case.op:36s} {case.name:20s} failed: {why}")
        return {"op": case.op, "name": case.name, "median_ms": None, "of_limit": None, "peak_bytes": 0, "error": why}
    median = statistics.median(times)
    share, bound = limit_of(case, of)
    share /= median
    spread = f"[{times[len(times) // 5]:.3f}, {times[len(times) * 4 // 5]:.3f}]"
    print(f"{case.op:36s} {case.name:20s} {median:9.3f} ms {spread}  {share:6.1%} of the limit ({bound})")
    row = {
        "op": case.op, "name": case.name, "median_ms": median, "of_limit": share, "bound": bound, "peak_bytes": peak
    }  # fmt: skip
    return row | {"times_ms": times}


def limit_of(case: gpu_cases.Case, of: dict[str, float]) -> tuple[float, str]:
    """(milliseconds that the case takes at least, by what): its bytes at the copy rate, or its flops."""
    moving, computing = 1e3 * case.bytes / of["copy"], 1e3 * case.flops / of[case.precision]
    return max(moving, computing), "memory" if moving >= computing else "products"


def measure_ops(
    sizes: gpu_cases.Sizes, device: torch.device, of: dict[str, float], write: Callable[[dict[str, Any]], None]
) -> None:
    """Every case, and the verdicts.

    Args:
        write: is given what is known after every case.
    """
    rows: list[dict[str, Any]] = []
    for case in gpu_cases.all_cases(sizes, device):
        rows.append(time_case(case, of, device))
        write({"rows": rows})
    logits = {f"head_loss, {classes:,} classes": 2.0 * classes * sizes.batch for classes in sizes.classes}
    verdicts = judge(rows, logits)
    for verdict in verdicts:
        print(verdict)
    write({"rows": rows, "targets": [vars(verdict) for verdict in verdicts]})


def measure_build(sizes: gpu_build.BuildSizes, device: torch.device) -> dict[str, Any]:
    """The end-to-end build by stages."""
    found = gpu_build.measure(sizes, device, lambda run: statistics.median(milliseconds(run, device, rounds=5)) / 1e3)
    for stage, seconds in found["stages"].items():
        print(f"build, per draw: {stage:10s} {seconds:10.4f} s")
    turns, beside = found["sampling"]["turns"], found["sampling"]["beside"]
    also = "not taken" if beside is None else f"{beside:.4f} s, {turns / beside:.2f} times as fast"
    print(f"build, per draw: probe and steps in turns {turns:.4f} s, the probe beside the next steps {also}")
    print(f"build, 1,000 draws at this rate: {found['thousand_draws_seconds'] / 3600:.2f} h")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/gpu.json"))
    parser.add_argument("--part", choices=("ops", "build"), help="only this part")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes; without a GPU in Triton's interpreter")
    options = parser.parse_args(arguments)
    interpreted = os.environ.get("TRITON_INTERPRET", "0") != "0"
    if not torch.cuda.is_available() and not (options.tiny and interpreted):
        hint = "set TRITON_INTERPRET=1 for --tiny" if options.tiny else "there is nothing to measure"
        print(f"bench.gpu: this machine has no CUDA device; {hint}", file=sys.stderr)
        return 2
    device = torch.device("cpu" if interpreted else "cuda")
    name = "Triton's interpreter: no measure of speed" if interpreted else torch.cuda.get_device_name(device)
    of = limits(device, 16, 2**10) if options.tiny else limits(device)
    print(f"{name}: copies {of['copy'] / 1e9:,.0f} GB/s, torch.mm {of['bf16'] / 1e12:,.1f} TFLOP/s in bfloat16")
    record: dict[str, Any] = {
        "device": name, "git_sha": provenance.git_sha(), "versions": provenance.versions(), "limits": of,
        "peers": {peer: gpu_cases.installed(peer) for peer in gpu_cases.PEERS},
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)

    def write(part: str, found: dict[str, Any]) -> None:
        record[part] = found
        options.out.write_text(json.dumps(record, indent=1) + "\n")

    if options.part != "build":
        measure_ops(gpu_cases.TINY if options.tiny else gpu_cases.Sizes(), device, of, partial(write, "ops"))
    if options.part != "ops":
        sizes = gpu_build.TINY_BUILD if options.tiny else gpu_build.BuildSizes()
        write("build", measure_build(sizes, device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
