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
COVERS = 1.96  # errors that nominally hold 95 %
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
    truth = known_truth(problem, chosen["n_beta"], gamma)
    return record | beside(record, truth, _block(kernel, problem)) | {"covered": covered(kernel, problem, truth)}


def covered(kernel: lossk.LossKernel, problem: Problem, truth: Truth) -> dict[str, float]:
    """The shares of K_ij, K_ii and R_ij (i < j) within 1.96 errors of the truth, and of trace K and the LLC: 0 or 1.

    Errors are the run's own, with the truth's. Samples that never move are left out.
    """
    rows, found = watched(problem.n), kernel.diagnostics
    variance = np.diag(truth.block)
    alive = variance > 0
    apart = np.triu(np.ones((alive.sum(),) * 2, dtype=bool), 1)

    def inside(correlation: bool) -> np.ndarray:
        scale = np.sqrt(np.outer(variance, variance)) if correlation else 1.0
        value = kernel.correlation(rows, rows) if correlation else kernel[rows, rows]
        own = kernel.standard_error(rows, rows, correlation=correlation)
        error = np.hypot(own.double().numpy(), truth.correlation_se if correlation else truth.block_se)
        with np.errstate(invalid="ignore", divide="ignore"):
            held = np.abs(value.double().numpy() - truth.block / scale) <= COVERS * error
        return held[alive][:, alive]

    k, r = inside(False), inside(True)
    shares = {"K_ij": k[apart].mean(), "K_ii": np.diag(k).mean(), "R_ij": r[apart].mean()}
    scalars = {"V": ("functional_variance", truth.trace, truth.trace_se), "LLC": ("llc", truth.llc, truth.llc_se)}
    for name, (kind, value, error) in scalars.items():
        ends = None if found is None else found.interval(kind)
        if ends is not None and np.isfinite(ends).all():
            middle, half = sum(ends) / 2, (ends[1] - ends[0]) / 2
            shares[name] = abs(middle - value) <= np.hypot(half, COVERS * error)
    return {name: float(share) for name, share in shares.items()}


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
