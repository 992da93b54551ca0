"""Each Triton kernel on a GPU, against the same work in torch and against the device's own limits, in one run.

    python -m bench.gpu [--out bench/results/gpu.json]

The limits are measured, not read from a data sheet: bandwidth by copying 1 GiB, FLOP rate by torch.mm of 8192 x 8192 in
the case's precision. Times are medians with 20/80 percentiles, after warm-up. Where there is no GPU it refuses.

Not here yet: quack-kernels, Liger and cut-cross-entropy as peers, and an end-to-end build. This file has never run on a
GPU (its cases have, in Triton's interpreter, at tiny sizes).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lossk.ops.head_loss import head_loss
from lossk.ops.rank_update import rank_update_triangle
from lossk.ops.sample_loss import sample_loss
from lossk.ops.sgld_step import sgld_step
from lossk.ops.top_correlations import EMPTY, merge_tile

HALF = torch.bfloat16


@dataclass(frozen=True)
class Sizes:
    """How large the cases are."""

    samples: int = 50_000
    ranks: tuple[int, ...] = (64, 512, 4096)
    batch: int = 4096
    classes: tuple[int, ...] = (1000, 131_072)
    depth: int = 1024
    parameters: tuple[int, ...] = (25_000_000, 1_000_000_000)
    tile: int = 4096


@dataclass(frozen=True)
class Case:
    """One thing to time, and what it must at least move or compute."""

    op: str
    name: str
    run: Callable[[], object]
    bytes: float = 0.0
    flops: float = 0.0


def loss_cases(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """Loss from logits, and from hidden states."""
    out = torch.zeros(sizes.batch, device=device)
    for classes in sizes.classes:
        labels = torch.arange(sizes.batch, device=device) % classes
        hidden = torch.randn(sizes.batch, sizes.depth, device=device, dtype=HALF)
        head = torch.randn(classes, sizes.depth, device=device, dtype=HALF)
        logits = hidden @ head.T

        def from_logits(x: Tensor = logits, labels: Tensor = labels) -> None:
            sample_loss(x, labels, out, backend="triton")

        def torch_from_logits(x: Tensor = logits, labels: Tensor = labels) -> Tensor:
            return cross_entropy(x, labels, reduction="none")

        def from_hidden(x: Tensor = hidden, head: Tensor = head, labels: Tensor = labels) -> None:
            head_loss(x, head, labels, out, backend="triton")

        def torch_from_hidden(x: Tensor = hidden, head: Tensor = head, labels: Tensor = labels) -> Tensor:
            return cross_entropy((x @ head.T).float(), labels, reduction="none")

        moved, flops = 2.0 * logits.numel(), 2.0 * logits.numel() * sizes.depth
        yield Case(f"sample_loss, {classes:,} classes", "lossk", from_logits, bytes=moved)
        yield Case(f"sample_loss, {classes:,} classes", "torch", torch_from_logits, bytes=moved)
        yield Case(f"head_loss, {classes:,} classes", "lossk", from_hidden, flops=flops)
        yield Case(f"head_loss, {classes:,} classes", "torch", torch_from_hidden, flops=flops)


def update_cases(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """The rank-k update of a whole triangle."""
    matrix = torch.zeros(sizes.samples, sizes.samples, device=device)
    for k in sizes.ranks:
        panel = torch.randn(k, sizes.samples, device=device, dtype=HALF)

        def update(panel: Tensor = panel) -> None:
            rank_update_triangle(matrix, panel, backend="triton", precision="bf16")

        def product(panel: Tensor = panel) -> Tensor:
            return torch.mm(panel.T, panel)

        op, flops = f"rank_update, k = {k:,}", float(sizes.samples) ** 2 * k
        yield Case(op, "lossk", update, flops=flops)  # half of what torch.mm must do: one of two triangles
        yield Case(op, "torch.mm", product, flops=2 * flops)


def neighbour_cases(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """The 10 nearest of each row of a tile."""
    tile, gain = torch.randn(sizes.tile, sizes.tile, device=device), torch.ones(sizes.tile, device=device)
    keys = torch.full((sizes.tile, 10), EMPTY, dtype=torch.int64, device=device)
    for backend, name in (("triton", "lossk"), ("torch", "torch")):

        def merge(backend: str = backend) -> None:
            merge_tile(keys.fill_(EMPTY), tile, gain, gain, first_row=0, first_column=sizes.tile, backend=backend)

        yield Case("top_correlations, 10 of a tile", name, merge, bytes=4.0 * tile.numel())


def step_cases(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """The SGLD step, and the same memory traffic without the noise."""
    for count in sizes.parameters:
        w, grad, anchor = (torch.zeros(count, device=device) for _ in range(3))

        def step(w: Tensor = w, grad: Tensor = grad, anchor: Tensor = anchor) -> None:
            physics = {"lr": 1e-6, "n_beta": 100.0, "localization": 10.0}
            sgld_step(w, grad, anchor, **physics, seed=1, chain=0, step=0, backend="triton")  # type: ignore[arg-type]

        def floor(w: Tensor = w, grad: Tensor = grad, anchor: Tensor = anchor) -> Tensor:
            return w.addcmul_(grad, anchor)

        op = f"sgld_step, {count:,} parameters"
        yield Case(op, "lossk", step, bytes=16.0 * count)
        yield Case(op, "floor: addcmul_", floor, bytes=16.0 * count)


def all_cases(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """Every case, made when it is asked for."""
    yield from loss_cases(sizes, device)
    yield from step_cases(sizes, device)
    yield from update_cases(sizes, device)
    yield from neighbour_cases(sizes, device)


def milliseconds(run: Callable[[], object], rounds: int = 20) -> list[float]:
    """Times of a call by the device's own clock, after three calls to warm up."""
    for _ in range(3):
        run()
    times = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)


def limits(device: torch.device) -> tuple[float, float]:
    """(bytes per second of a copy, flops per second of torch.mm in bfloat16), measured."""
    source = torch.empty(2**28, device=device)
    copy = statistics.median(milliseconds(lambda: source.clone()))
    square = torch.randn(8192, 8192, device=device, dtype=HALF)
    product = statistics.median(milliseconds(lambda: square @ square))
    return 2 * 4 * 2**28 / copy * 1e3, 2 * 8192**3 / product * 1e3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/gpu.json"))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench.gpu: this machine has no CUDA device; there is nothing to measure", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    bandwidth, rate = limits(device)
    name = torch.cuda.get_device_name(device)
    print(f"{name}: copies {bandwidth / 1e9:,.0f} GB/s, torch.mm {rate / 1e12:,.0f} TFLOP/s in bfloat16")
    rows = []
    for case in all_cases(Sizes(), device):
        times = milliseconds(case.run)
        median = statistics.median(times)
        share = max(case.bytes / bandwidth, case.flops / rate) / median * 1e3
        rows.append({"op": case.op, "name": case.name, "median_ms": median, "of_limit": share, "times_ms": times})
        spread = f"[{times[len(times) // 5]:.3f}, {times[len(times) * 4 // 5]:.3f}]"
        print(f"{case.op:36s} {case.name:16s} {median:9.3f} ms {spread}  {share:6.1%} of the limit")
    record = {"device": name, "torch": torch.__version__, "python": platform.python_version(), "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
