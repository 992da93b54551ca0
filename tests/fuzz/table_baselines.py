"""Valid calls of `lossk.analysis.baselines`, `.gradients` and `.influence_functions`."""

from __future__ import annotations

import torch

from . import rules as r
from .table import Table
from .table_core import LOSS, SPANS, WORDS, _key, source
from .world import N, World

SEED = {"seed": r.integer(0)}


def add_to(table: Table, w: World) -> None:
    """Every entry of the three modules."""
    _baseline(table, w)
    model = {"model": w.model, "data": w.data}
    rules = {
        "data": source, "train": source, "loss": LOSS, "params": r.optional(r.sequence_of(r.text, least=1)),
        "layer": r.optional(r.text), "dimensions": r.optional(r.integer(4)), **SEED,
        "damping": r.number(above=0.0), "tolerance": r.number(above=0.0),
        "curvature": r.choice("gauss-newton", "hessian"), "solver": r.choice("auto", "dense", "cg"),
    }  # fmt: skip
    where = "lossk.analysis.baselines"
    table.add(f"{where}.raw_inputs", {"data": w.data}, rules)
    for name in ("penultimate_features", "gradient_cosine", "gradient_norms", "confusion"):
        table.add(f"{where}.{name}", model, rules)
    table.add(f"{where}.knn_disagreement", {"features": w.baseline, "labels": w.labels, "k": 2},
              {"features": r.instance(type(w.baseline)), "labels": r.labels, "k": r.integer(1)})  # fmt: skip
    where = "lossk.analysis.influence_functions"
    table.add(f"{where}.damped_influence", {**model, "train": w.data, "damping": 1.0}, rules)


def _baseline(table: Table, w: World) -> None:
    from lossk.analysis.gradients import Sketch

    where, on, span = "lossk.analysis.baselines.Baseline", w.baseline, {"rows": r.rows, "columns": r.rows}
    table.add(where, {"name": "a", "features": w.x},
              {"duals": r.optional(r.instance(torch.Tensor)), "sets": SPANS, "noise": r.number(least=0.0),
               "tile": r.integer(1)})  # fmt: skip
    table.add(f"{where}.__getitem__", {"key": 1}, {"key": _key}, on=on, words=WORDS)
    for name in ("similarity", "correlation"):
        table.add(f"{where}.{name}", {}, span, on=on)
    table.add(f"{where}.matvec", {"v": w.random(N)}, {"v": r.array(1, 2)}, on=on)
    table.add(f"{where}.neighbors", {"k": 2}, {"k": r.integer(1), "rows": r.optional(r.rows)}, on=on)
    table.add("lossk.analysis.gradients.Sketch", {"num_weights": 10, "dimensions": 4, "seed": 0},
              {"num_weights": r.integer(1), "dimensions": r.integer(4), **SEED})  # fmt: skip
    table.add("lossk.analysis.gradients.Sketch.__call__", {"gradients": w.random(3, 10)},
              {"gradients": r.instance(torch.Tensor)}, on=Sketch(10, 4, 0))  # fmt: skip
