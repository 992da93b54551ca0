"""Memory of calls: what was allowed (`memory=`), planned before sampling, and taken at the peak, one process a case.

    python -m bench.memory_plan --out docs/memory.md

The peak is the resident memory of the process, sampled every millisecond, beyond what it held when the call began.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from lossk.memory import give_back
from lossk.provenance import git_sha

EVERY = 1e-3  # seconds between two readings of the resident memory
MB = 1e6


@dataclass(frozen=True)
class Case:
    """One call."""

    name: str
    call: str  # a function of this file
    model: str  # "wide", "deep", "conv", "small"
    num_samples: int
    width: int  # of the inputs
    memory: str | None = None
    settings: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Found:
    """Bytes; a refusal has no peak."""

    case: str
    budget: str | None
    plan: int | None
    peak: int | None
    note: str = ""


def cases(scale: float = 1.0) -> list[Case]:
    """Every form and call, at sizes that leave no doubt which part of the memory is whose."""
    n = int(4000 * scale)
    tiles = (("tile", 512),)
    return [
        Case("tiles in memory", "build", "small", n, 32, None, tiles),
        Case("tiles in memory, wide MLP", "build", "wide", n, 256, "200MB", tiles),
        Case("tiles in memory, wide MLP, little", "build", "wide", n, 256, "120MB", tiles),
        Case("tiles in memory, convolutions", "build", "conv", n // 8, 14, None, tiles),
        Case("tiles in the store", "build_store", "small", 2 * n, 32, "60MB", (("tile", 256),)),
        Case("tiles in the store, wide MLP", "build_store", "wide", 2 * n, 64, "100MB", (("tile", 256),)),
        Case("factor in memory", "build", "small", n, 32, None, (("form", "factor"),)),
        Case("factor in the store", "build_store", "small", n, 32, None, (("form", "factor"), ("tile", 512))),
        Case("sample_losses", "sample", "small", 2 * n, 32),
        Case("sample_losses, wide MLP", "sample", "wide", n, 256),
        Case("cross_kernel", "cross", "small", 2 * n, 32),
        Case("cross_kernel, many draws", "cross", "small", 2 * n, 32, None, (("num_draws", 200), ("num_chains", 4))),
        *[
            Case(f"{name} of a kernel in {form}", name, "small", n, 32, None, settings)
            for form, settings in (("tiles", tiles), ("factor", (("form", "factor"),)))
            for name in READS
        ],
    ]


def network(name: str, width: int) -> nn.Module:
    """A network of that name."""
    torch.manual_seed(0)
    if name == "wide":
        return nn.Sequential(nn.Linear(width, 2048), nn.ReLU(), nn.Linear(2048, 10))
    if name == "conv":
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
        )  # fmt: skip
    return nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, 10))


def data(case: Case) -> tuple[Tensor, Tensor]:
    """Inputs and classes."""
    generator = torch.Generator().manual_seed(1)
    shape = (1, case.width, case.width) if case.model == "conv" else (case.width,)
    return torch.randn(case.num_samples, *shape, generator=generator), torch.arange(case.num_samples) % 10


def common(case: Case) -> dict[str, Any]:
    """Settings of every call."""
    import lossk

    sampler = lossk.SGLD(lr=1e-5, n_beta=100.0, localization=100.0, num_burnin_steps=2, num_steps_bw_draws=1)
    return {"sampler": sampler, "num_chains": 2, "num_draws": 20, "backend": "torch", **dict(case.settings)}


def build(case: Case, folder: Path) -> Any:
    """`build_kernel` in memory."""
    import lossk

    return lossk.build_kernel(network(case.model, case.width), data(case), memory=case.memory, **common(case))


def build_store(case: Case, folder: Path) -> Any:
    """`build_kernel` into a store."""
    import lossk

    settings = {**common(case), "out": folder / "k.lossk", "memory": case.memory}
    return lossk.build_kernel(network(case.model, case.width), data(case), **settings)


def sample(case: Case, folder: Path) -> Any:
    """`sample_losses`."""
    import lossk

    return lossk.sample_losses(network(case.model, case.width), data(case), **common(case))


def cross(case: Case, folder: Path) -> Any:
    """`cross_kernel` of three quarters against the rest."""
    import lossk

    inputs, targets = data(case)
    cut = 3 * case.num_samples // 4
    model = network(case.model, case.width)
    return lossk.cross_kernel(model, (inputs[:cut], targets[:cut]), (inputs[cut:], targets[cut:]), **common(case))


def _map(kernel: Any) -> Any:
    from lossk.analysis import map_kernel

    return map_kernel(kernel)


def _report(kernel: Any) -> Any:
    from lossk.report.page import write_report

    with tempfile.TemporaryDirectory() as name:
        labels = torch.arange(kernel.num_samples) % 10
        return write_report(kernel, Path(name) / "k.html", labels=labels, progress=False)


READS: dict[str, Callable[[Any], Any]] = {
    "neighbors": lambda kernel: kernel.neighbors(10),
    "neighbors of rows": lambda kernel: kernel.neighbors(10, rows=range(100)),
    "matvec": lambda kernel: kernel.matvec(kernel.variance.repeat(8, 1).T),
    "eigsh": lambda kernel: kernel.eigsh(6),
    "to_numpy": lambda kernel: kernel.to_numpy(),
    "block": lambda kernel: kernel[: kernel.num_samples // 2],
    "map": _map,
    "report": _report,
}


CALLS: dict[str, Callable[[Case, Path], Any]] = {
    "build": build, "build_store": build_store, "sample": sample, "cross": cross,
}  # fmt: skip


def run_read(case: Case, folder: Path) -> Found:
    """Of a kernel that is held: what was foreseen by the check that would refuse it, and the peak beyond the kernel."""
    from lossk.kernel import read_memory

    read, plans = READS[case.call], []
    read(build(Case("warm", case.call, "small", 640, 8, None, case.settings), folder))
    kernel = build(case, folder)
    refuse = read_memory.refuse

    def noted(needed: int, what: str, instead: str) -> None:
        plans.append(needed + read_memory.INSIDE)
        refuse(needed, what, instead)

    read_memory.refuse = noted  # type: ignore[assignment]
    give_back()
    seen: dict[str, int] = {}
    with watched(seen):
        read(kernel)
    return Found(case.name, case.memory, max(plans), seen["peak"])


@contextmanager
def watched(seen: dict[str, int]) -> Any:
    """Meanwhile keep the largest resident memory, beyond that of now, in `seen["peak"]`."""
    process, done = psutil.Process(), threading.Event()
    start = process.memory_info().rss
    seen["peak"] = 0

    def look() -> None:
        while not done.is_set():
            seen["peak"] = max(seen["peak"], process.memory_info().rss - start)
            time.sleep(EVERY)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def run_case(case: Case) -> Found:
    """In this process, after a small call that loads what is loaded at first use."""
    import lossk.run.work

    torch.set_num_threads(1)
    if case.call in READS:
        with tempfile.TemporaryDirectory() as name:
            return run_read(case, Path(name))
    plans: list[int] = []
    planned = lossk.run.work.plan

    def noted(*arguments: Any, **settings: Any) -> Any:
        found = planned(*arguments, **settings)
        plans.append(found.layout.peak_bytes)
        return found

    lossk.run.work.plan = noted
    seen: dict[str, int] = {}
    with tempfile.TemporaryDirectory(dir=os.environ.get("LOSSK_BENCH_DIR")) as name:
        folder = Path(name)
        small = Case("warm", case.call, "small", 64, 8, None, case.settings)
        (folder / "warm").mkdir()
        CALLS[case.call](small, folder / "warm")
        plans.clear()
        try:
            with watched(seen):
                CALLS[case.call](case, folder)
        except MemoryError as error:
            return Found(case.name, case.memory, None, seen["peak"], f"refused: {str(error)[:160]}")
    return Found(case.name, case.memory, plans[-1], seen["peak"])


def measure(options: argparse.Namespace) -> list[Found]:
    """Each case in a process of its own."""
    found = []
    for index, case in enumerate(cases(options.scale)):
        if options.only and options.only not in case.name:
            continue
        command = [sys.executable, "-m", "bench.memory_plan", "--case", str(index), "--scale", str(options.scale)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{case.name}: {done.stderr[-2000:]}")
        found.append(Found(**json.loads(done.stdout.splitlines()[-1])))
        print(row(found[-1]), flush=True)
    return found


def row(found: Found) -> str:
    """Of the table."""
    plan, peak = ("-" if value is None else f"{value / MB:.0f}" for value in (found.plan, found.peak))
    return f"| {found.case} | {found.budget or '-'} | {plan} | {peak} | {found.note} |"


def section(found: list[Found], scale: float) -> str:
    """The page."""
    rows = "\n".join(map(row, found))
    return (
        "# Memory, planned and taken\n\n"
        f"`python -m bench.memory_plan --scale {scale:g} --out docs/memory.md`. MB beyond what the process held when "
        "the call began; the peak is its resident memory, read every millisecond; one process a case, one thread. Of "
        "what is read "
        "from a kernel the plan is what the call would be refused for, and the peak is beyond the kernel held.\n\n"
        f"Commit {git_sha() or 'unknown'}, {os.cpu_count()} cores, {platform.machine()}, "
        f"PyTorch {torch.__version__}; sizes times {scale:g}.\n\n"
        "| call | `memory=` | planned | peak | |\n|---|---|---|---|---|\n" + rows + "\n"
    )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="write the page")
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of samples")
    parser.add_argument("--only", help="cases whose name has this")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case is not None:
        print(json.dumps(asdict(run_case(cases(options.scale)[options.case]))))
        return
    page = section(measure(options), options.scale)
    if options.out is not None:
        options.out.write_text(page)


if __name__ == "__main__":
    main()
