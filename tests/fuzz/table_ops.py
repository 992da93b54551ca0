"""Valid calls of `lossk.ops`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from . import rules as r
from .table import Table
from .world import World

TENSOR = r.instance(torch.Tensor)
BACKEND, PRECISION = r.choice("torch", "cpp", "triton"), r.choice("fp32", "tf32x3", "tf32", "fp16", "bf16")
COUNTER = r.integer(0, 2**32 - 1)
WORDS = {"key": ("seed", "chain"), "counter": ("counters",)}


def add_to(table: Table, w: World) -> None:
    """Every entry of the package."""
    _losses(table, w)
    _updates(table, w)
    _numbers(table, w)
    from lossk.ops import triton_kernels

    device = torch.device("cpu")
    op = {"op": r.choice(*triton_kernels.OPS), "device": r.instance(torch.device)}
    table.add("lossk.ops.triton_kernels.KernelStatus", {"available": True, "reason": "", "interpreted": False})
    for name in ("status", "load"):
        table.add(f"lossk.ops.triton_kernels.{name}", {"op": "sample_loss", "device": device}, op)
    table.add("lossk.ops.triton_kernels.refusal", {"device": device}, op)


def _losses(table: Table, w: World) -> None:
    targets = torch.tensor([0, 1, 2], dtype=torch.int64)

    def call(**more: Any) -> Any:
        return lambda: {"targets": targets.clone(), "out": torch.zeros(3, dtype=torch.float32), **more}

    rules = {"ignore_index": r.integer(), "backend": BACKEND, "precision": PRECISION, "bias": r.optional(TENSOR)}
    table.add("lossk.ops.head_loss.head_loss",
              call(hidden=w.random(3, 4), head=w.random(5, 4), backend="torch"), rules)  # fmt: skip
    logits = {"logits": w.random(3, 5), "targets": targets}
    table.add("lossk.ops.sample_loss.sample_loss", call(logits=w.random(3, 5), backend="torch"), rules)
    table.add("lossk.ops.sample_loss.cross_entropy", logits, rules)
    table.add("lossk.ops.sample_loss.cross_entropy_slopes", {**logits, "scale": 1.0, "backend": "torch"}, rules)


def _updates(table: Table, w: World) -> None:
    panel = w.random(2, 16)
    rules = {"backend": BACKEND, "precision": PRECISION,
             **dict.fromkeys(("mean", "inverse_scale", "last"), r.optional(TENSOR))}  # fmt: skip
    table.add("lossk.ops.rank_update.rank_update",
              lambda: {"tile": w.random(16, 16), "rows_i": panel.clone(), "rows_j": panel.clone()}, rules)  # fmt: skip
    table.add("lossk.ops.rank_update.rank_update_triangle",
              lambda: {"matrix": w.random(16, 16), "panel": panel.clone(), "backend": "torch"}, rules)  # fmt: skip
    positive, least = r.number(above=0.0), r.number(least=0.0)
    table.add(
        "lossk.ops.sgld_step.sgld_step",
        lambda: {
            **{name: w.random(5).clone() for name in ("w", "grad", "anchor")},
            "lr": 0.1, "n_beta": 1.0, "localization": 1.0, "seed": 0, "chain": 0, "step": 0, "backend": "torch",
        },
        {
            "lr": positive, "n_beta": least, "localization": least, "seed": COUNTER, "chain": COUNTER,
            "step": COUNTER, "backend": BACKEND, "alpha": least, "stability": positive,
            "square_avg": r.optional(TENSOR),
        },
    )  # fmt: skip
    keys = {"keys": torch.full((3, 2), -(2**63), dtype=torch.int64)}
    first = {"first_row": r.integer(0), "first_column": r.integer(0), "backend": BACKEND}
    table.add("lossk.ops.top_correlations.top_correlations",
              {**keys, "correlation": w.random(3, 4), "first_column": 0}, first)  # fmt: skip
    gains = {"row_gain": torch.ones(3), "column_gain": torch.ones(4)}
    table.add("lossk.ops.top_correlations.merge_tile",
              lambda: {"keys": keys["keys"].clone(), "tile": w.random(3, 4), **gains, "first_row": 0,
                       "first_column": 4, "backend": "torch"}, first)  # fmt: skip
    table.add("lossk.ops.top_correlations.unpack", keys)


def _numbers(table: Table, w: World) -> None:
    counter, words = np.zeros((2, 4), dtype=np.uint32), np.zeros((1, 4), dtype=np.uint32)
    unsigned = r.array(1, 2, kinds="u")
    table.add("lossk.ops.philox.philox4x32", {"counter": counter, "key": (1, 2)},
              {"counter": unsigned, "key": r.sequence_of(COUNTER, least=2)}, words=WORDS)  # fmt: skip
    numbers = {"seed": COUNTER, "chain": COUNTER, "step": COUNTER, "stream": COUNTER, "count": r.integer(0)}
    start = {"seed": 0, "chain": 0, "step": 0, "count": 3}
    table.add("lossk.ops.philox.uint32_stream", {**start, "stream": 0}, numbers)
    table.add("lossk.ops.philox.normals", start, numbers)
    table.add("lossk.ops.philox.box_muller", {"words": words}, {"words": unsigned})
