"""One SGLD step over P parameters: lossk's C++ step against torch and against the memory.

    python -m bench.sgld_step [--large] [--simd LEVEL] [--out bench/results]

The floor is `w.addcmul_(grad, anchor)`: it reads the three arrays and writes one, as the step must, and computes next
to nothing. Cases take turns, so that a machine that slows down slows them all.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from bench.markdown import spread, table
from bench.options import Found, Options
from lossk.ops import extension

LR, N_BETA, LOCALIZATION = 1e-6, 100.0, 10.0
Case = Callable[[], object]


def make_cases(count: int, simd: str, num_threads: int) -> dict[str, Case]:
    """The competitors, on arrays of their own kind: [count] float32."""
    w, grad, anchor, square_avg = (torch.randn(count) for _ in range(4))
    square_avg.abs_()
    noise = torch.empty(count)
    module = extension.load()
    addresses = {"w": w.data_ptr(), "grad": grad.data_ptr(), "anchor": anchor.data_ptr()}
    physics = {"lr": LR, "n_beta": N_BETA, "localization": LOCALIZATION, "alpha": 0.99, "stability": 0.1}
    noise_key = {"seed": 1, "chain": 0, "step": 0, "num_threads": num_threads, "simd": simd}

    def expression() -> object:
        return w - LR / 2 * (N_BETA * grad + LOCALIZATION * (w - anchor)) + math.sqrt(LR) * torch.randn(count)

    def in_place() -> object:
        drift = w.sub(anchor).mul_(LOCALIZATION).add_(grad, alpha=N_BETA)
        return w.add_(drift, alpha=-LR / 2).add_(noise.normal_(), alpha=math.sqrt(LR))

    def ours(state: int) -> object:
        return module.sgld_step(
            **addresses, **physics, **noise_key, count=count, square_avg=state, update_square_avg=True
        )

    return {
        "torch expression": expression,
        "torch in place": in_place,
        "torch.randn alone": lambda: torch.randn(count),
        "floor: addcmul_": lambda: w.addcmul_(grad, anchor, value=1e-12),
        "lossk": lambda: ours(0),
        "lossk rmsprop": lambda: ours(square_avg.data_ptr()),
    }


def time_cases(cases: dict[str, Case], seconds: float, least: int = 5) -> dict[str, dict[str, float]]:
    """Milliseconds of each case, taking turns for about `seconds`, at least `least` rounds."""
    samples: dict[str, list[float]] = {name: [] for name in cases}
    for case in cases.values():
        case()
    start = time.perf_counter()
    rounds = 0
    while rounds < least or time.perf_counter() - start < seconds:
        for name, case in cases.items():
            begin = time.perf_counter()
            case()
            samples[name].append(1e3 * (time.perf_counter() - begin))
        rounds += 1
    return {
        name: {
            "median_ms": float(np.median(ms)),
            "p20_ms": float(np.percentile(ms, 20)),
            "p80_ms": float(np.percentile(ms, 80)),
            "min_ms": min(ms),
            "rounds": rounds,
        }
        for name, ms in samples.items()
    }


def report(count: int, times: dict[str, dict[str, float]]) -> dict[str, float]:
    """Print one size's table; return its ratios of medians."""
    ours = times["lossk"]["median_ms"]
    print(f"\n{count:,} parameters{'':<8} median      p20      p80      min  [ms]   over lossk")
    for name, row in times.items():
        numbers = "".join(f"{row[key]:9.3f}" for key in ("median_ms", "p20_ms", "p80_ms", "min_ms"))
        print(f"  {name:<22}{numbers}        {row['median_ms'] / ours:8.2f} x")
    return ratios(times)


def ratios(times: dict[str, dict[str, float]]) -> dict[str, float]:
    """Of medians."""
    ours = times["lossk"]["median_ms"]
    return {
        "expression / lossk": times["torch expression"]["median_ms"] / ours,
        "in place / lossk": times["torch in place"]["median_ms"] / ours,
        "lossk / floor": ours / times["floor: addcmul_"]["median_ms"],
    }


def environment(simd: str, num_threads: int) -> dict[str, str | int]:
    """What a number means nothing without."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    cpu = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "device": cpu[0] if cpu else platform.processor() or platform.machine(),
        "num_threads": num_threads,
        "simd": simd,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "git_sha": git.stdout.strip() or "unknown",
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def measure(options: Options) -> Found:
    """For `python -m bench`: every size, with the fastest instructions there are."""
    sizes = options.pick(full=(1_000_000, 25_000_000, 100_000_000), quick=(1_000_000, 4_000_000), tiny=(1000,))
    taken = options.pick(full=15.0, quick=1.0, tiny=0.0)
    found = {}
    for count in sizes:
        times = time_cases(make_cases(count, "auto", options.threads), taken)
        found[str(count)] = {"times": times, "ratios": ratios(times)}
    return found


def section(found: Found) -> str:
    """Of the page: times as median (20 to 80 percentile), and what the step is judged by."""
    rows = []
    for count, each in found.items():
        keys = ("median_ms", "p20_ms", "p80_ms")
        quantiles = [{key[:-3]: one[key] * 1e-3 for key in keys} for one in each["times"].values()]
        rows.append([f"{int(count):,}", *(spread(one, "s") for one in quantiles)])
        rows[-1] += [f"{value:.3g}" for value in each["ratios"].values()]
    first = next(iter(found.values()))
    head = ["weights", *first["times"], *first["ratios"]]
    return "\n\n".join(["## One SGLD step", table(head, rows), HOW])


HOW = """Targets: expression / lossk at least 8, lossk / floor at most 2. The floor reads the same three arrays and
writes one, `w.addcmul_(grad, anchor)`. In place; cases take turns."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000_000, 25_000_000], help="numbers of parameters")
    parser.add_argument("--large", action="store_true", help="also 100 million parameters (2.5 GB)")
    parser.add_argument("--seconds", type=float, default=8.0, help="time per size")
    parser.add_argument("--simd", default="auto", help="auto, avx512, avx2 or baseline")
    parser.add_argument("--out", type=Path, help="folder for the JSON record")
    options = parser.parse_args()

    num_threads = torch.get_num_threads()
    machine = environment(extension.load().simd(options.simd), num_threads)
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    results = {}
    for count in [*options.sizes, *([100_000_000] if options.large else [])]:
        times = time_cases(make_cases(count, options.simd, num_threads), options.seconds)
        ratios = report(count, times)
        print("  " + ", ".join(f"{name} {value:.2f}" for name, value in ratios.items()))
        results[str(count)] = {"times": times, "ratios": ratios}
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / f"sgld_step-{machine['simd']}-{time.strftime('%Y%m%d-%H%M%S')}.json"
        path.write_text(json.dumps({"environment": machine, "results": results}, indent=1) + "\n")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
