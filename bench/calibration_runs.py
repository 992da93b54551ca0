"""One run of the engine beside the truth of its law."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

import lossk
from bench.calibration_problems import Problem
from bench.calibration_truth import Truth, truth_of, watched
from lossk.errors import DivergedError

STATED = 0.10  # of trace K or the LLC: what a bias of 5 % of a variance makes of a variance of squares
ERRORS = 3.0  # stated standard errors that a right run may be off beyond that
LIKE = 0.8  # correlation of R's entries with the true ones, below which R is not determined
SMALL: dict[str, Any] = {"num_chains": 2, "num_draws": 20}

_truths: dict[tuple[str, float, float], Truth] = {}


def known_truth(problem: Problem, n_beta: float, gamma: float) -> Truth:
    """Worked out once for every law."""
    key = (problem.name, n_beta, gamma)
    if key not in _truths:
        _truths[key] = truth_of(problem, n_beta, gamma)
    return _truths[key]


def run(problem: Problem, sampler: Any = None, **settings: Any) -> dict[str, Any]:
    """Build the kernel of the training set; a plain record of it beside its truth."""
    begin = time.process_time()
    try:
        kernel = lossk.build_kernel(
            problem.model, problem.data, loss=problem.loss, sampler=sampler, progress=False, **settings
        )
    except DivergedError as error:
        return {"problem": problem.name, "verdict": "DivergedError", "advice": str(error)[:200]}
    found = kernel.diagnostics
    assert found is not None
    chosen = kernel.meta["sampler"]
    trace = found.functional_variance
    record = {
        "problem": problem.name,
        "verdict": found.verdict,
        "advice": found.advice,
        "sampler": {name: value for name, value in chosen.items() if name != "params"},
        "trace": float(kernel.variance.sum()),
        "trace_se": None if trace is None or not np.isfinite(trace.se) else trace.se,
        "llc": found.llc,
        "llc_se": None if found.llc_se is None or not np.isfinite(found.llc_se) else found.llc_se,
        "foreseen_bias": getattr(found, "foreseen_bias", None),
        "reliability": getattr(found, "reliability", None),
        "seconds": time.process_time() - begin,
    }
    gamma = float(chosen["localization"])
    if chosen.get("metric") is not None:  # a law in scaled coordinates, of which no truth is worked out here
        return record
    return record | beside(record, known_truth(problem, chosen["n_beta"], gamma), _block(kernel, problem))


def _block(kernel: lossk.LossKernel, problem: Problem) -> np.ndarray:
    rows = watched(problem.n)
    return kernel.correlation(rows, rows).double().numpy()


def beside(record: dict[str, Any], truth: Truth, block: np.ndarray) -> dict[str, Any]:
    """The truth, and how far from it the run is."""
    scale = np.sqrt(np.diag(truth.block))
    alive = scale > 0
    block, scale, true_block = block[alive][:, alive], scale[alive], truth.block[alive][:, alive]
    apart = ~np.eye(len(block), dtype=bool)
    like = np.corrcoef(block[apart], (true_block / np.outer(scale, scale))[apart])[0, 1]
    out = {
        "truth": truth.how,
        "true_trace": truth.trace,
        "true_trace_se": truth.trace_se,
        "true_llc": truth.llc,
        "true_llc_se": truth.llc_se,
        "truth_rhat": truth.rhat,
        "likeness": float(like),
    }
    return out | {"wrong": wrong({**record, **out})}


def wrong(record: dict[str, Any]) -> list[str]:
    """What of a run is further from the truth than its stated bias and 3 of its stated errors (and the truth's own)."""
    out = []
    for name in ("trace", "llc"):
        if record[name] is None:
            continue
        se = np.hypot(record[f"{name}_se"] or 0.0, record[f"true_{name}_se"])
        if not abs(record[name] - record[f"true_{name}"]) <= STATED * abs(record[f"true_{name}"]) + ERRORS * se:
            out.append({"trace": "trace K", "llc": "LLC"}[name])
    if not record["likeness"] >= LIKE:
        out.append("R")
    return out
