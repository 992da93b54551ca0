"""Section 3: the law that is chosen, over seeds and over batch sizes; it should be one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

import lossk
from bench.calibration_problems import Problem, curvature, problem
from bench.calibration_runs import known_truth
from bench.markdown import table
from lossk.recipes import digits

NAMES = ("linear", "ill-scaled linear", "ReLU MLP", "logistic", "softmax", "singular", "memorised", "40 blocks",
         "digits")  # fmt: skip
BATCHES = (4, 32, 256)
Row = dict[str, Any]


@lru_cache(maxsize=1)
def _digits() -> tuple[Any, Any]:
    task = digits.make_task()
    return task.model, task.train


def chosen(name: str, seed: int, **settings: Any) -> float | str:
    """The localization of an automatic run of two draws, or what became of it."""
    if name == "digits":
        (model, data), loss = _digits(), "cross_entropy"
    else:
        of = problem(name)
        model, data, loss = of.model, of.data, of.loss
    try:
        kernel = lossk.build_kernel(
            model, data, loss=loss, sampler=lossk.SGLD(**settings), num_chains=1, num_draws=2, seed=seed, progress=False
        )
    except lossk.errors.DivergedError:
        return "DivergedError"
    found = kernel.meta["sampler"]["localization"]
    return float(found) if isinstance(found, float | int) else str(found)


def measure(seeds: Iterable[int], small: bool = False) -> Iterator[list[Row]]:
    """All rows so far, after each network."""
    rows: list[Row] = []
    for name in ("small linear",) if small else NAMES:
        found = {"problem": name, "localization": [chosen(name, seed) for seed in seeds],
                 "batches": {str(size): chosen(name, 0, batch_size=size) for size in BATCHES}}  # fmt: skip
        if name != "digits":
            found |= _consequence(problem(name), found["localization"])
        rows.append(found)
        yield rows


def _consequence(of: Problem, laws: list[Any]) -> Row:
    """n_beta h_max by the Hessian in float64, and the true trace K at the least and the largest localization."""
    numbers = sorted(law for law in laws if isinstance(law, float))
    out: Row = {"stiffest": of.n_beta * float(curvature(of)[-1])}
    if numbers and (of.design is not None or of.product or numbers[0] < numbers[-1]):
        out["traces"] = [known_truth(of, of.n_beta, law).trace for law in (numbers[0], numbers[-1])]
    return out


def section(record: Row) -> str:
    """Markdown."""
    lines = []
    for row in record["rows"]:
        laws = row["localization"]
        numbers = sorted(law for law in laws if isinstance(law, float))
        batches = " / ".join(_shown(law) for law in row["batches"].values())
        traces = row.get("traces")
        lines.append([row["problem"], f"{row['stiffest']:.3g}" if "stiffest" in row else "", f"{len(set(laws))}",
                      f"{_shown(numbers[0])} to {_shown(numbers[-1])}" if numbers else "",
                      f"{numbers[-1] / numbers[0]:.2f}" if numbers else "", f"{len(laws) - len(numbers)}", batches,
                      f"{max(traces) / min(traces):.2f}" if traces else ""])  # fmt: skip
    head = ["network", "n_beta h_max at w\\*", "laws", "localization", "ratio", "no law", "batches of 4 / 32 / 256",
            "true trace K, ratio"]  # fmt: skip
    return (
        "## The law over seeds\n\n`localization='auto'` over seeds, and with batches of 4, 32 and 256 samples at "
        "seed 0. The last column: the true trace K at the least localization over that at the largest, which no error "
        "bar of one run tells.\n\n" + table(head, lines)
    )


def _shown(law: float | str) -> str:
    return f"{law:.4g}" if isinstance(law, float) else law
