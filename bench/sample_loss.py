"""Exact cross entropy per sample against torch's, and against reading the logits once.

python -m bench.sample_loss [--quick]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bench.markdown import seconds, table
from bench.options import Found, Options, run_alone
from bench.sgld_step import time_cases
from lossk.ops.sample_loss import cross_entropy

OURS, TORCH, FLOOR = "lossk", "F.cross_entropy", "logits.sum(): one read"


def measure(options: Options) -> Found:
    shapes = options.pick(
        full=((256, 10), (256, 1000), (64, 50_257)), quick=((256, 10), (256, 1000), (64, 50_257)), tiny=((4, 10),)
    )
    taken = options.pick(full=5.0, quick=0.5, tiny=0.0)
    return {f"{batch} x {classes}": measure_shape(batch, classes, taken) for batch, classes in shapes}


def measure_shape(batch: int, classes: int, taken: float) -> Found:
    torch.manual_seed(0)
    logits, targets = 3 * torch.randn(batch, classes), torch.randint(0, classes, (batch,))

    @torch.inference_mode()
    def ours() -> object:
        return cross_entropy(logits, targets, backend="cpp")

    @torch.inference_mode()
    def plain() -> object:
        return F.cross_entropy(logits, targets, reduction="none")

    @torch.inference_mode()
    def read() -> object:
        return logits.sum()

    times = time_cases({OURS: ours, TORCH: plain, FLOOR: read}, taken)
    return {"bytes": logits.nbytes, "times": times}


def section(found: Found) -> str:
    rows = []
    for shape, each in found.items():
        times = {name: 1e-3 * one["median_ms"] for name, one in each["times"].items()}
        rate = each["bytes"] / times[OURS] / 1e9
        over = [f"{times[OURS] / times[name]:.2f}" for name in (TORCH, FLOOR)]
        rows.append([shape, *(seconds(value) for value in times.values()), *over, f"{rate:.3g} GB/s"])
    head = ["B x C", OURS, TORCH, FLOOR, "lossk / torch", "lossk / read", "logits per second"]
    return "\n\n".join(["## Loss per sample", table(head, rows), HOW])


HOW = """Medians, cases taking turns, float32 logits, under `inference_mode`. lossk's is exact to about 1e-6 for losses
down to 1e-38; torch's loses them below about 6e-8 (`lossk.ops.sample_loss`)."""


if __name__ == "__main__":
    run_alone(measure, section, __doc__)
