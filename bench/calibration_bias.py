"""Section 1: trace K and the LLC of automatic runs, against the truth of the law each chose."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from bench.calibration_faults import JUDGED, NEVER
from bench.calibration_problems import problem
from bench.calibration_runs import SMALL, run
from bench.calibration_verdicts import mistaken
from bench.markdown import table

NAMES = ("linear", "ill-scaled linear", "ReLU MLP", "logistic", "softmax", "singular", "memorised", "40 blocks",
         "heavy-tailed", "untrained", "saddle")  # fmt: skip
HELD = ("K_ij", "K_ii", "R_ij", "V", "LLC")
Row = dict[str, Any]


def measure(seeds: Iterable[int], small: bool = False) -> Iterator[list[Row]]:
    """All rows so far, after each run."""
    rows: list[Row] = []
    for name in ("small linear",) if small else NAMES:
        for seed in seeds:
            of = problem(name)
            found = run(of, seed=seed, **(SMALL if small else {}))
            rows.append(found | {"seed": seed, "may_be_good": JUDGED if of.minimum else NEVER})
            yield rows


def section(record: Row) -> str:
    """Markdown."""
    rows = record["rows"]
    lines = []
    for name in dict.fromkeys(row["problem"] for row in rows):
        ended = [row for row in rows if row["problem"] == name]
        known = [row for row in ended if "truth" in row]
        good = sum(row["verdict"] == "good" for row in ended)
        bad = sum(map(mistaken, ended))
        lines.append([name, known[0]["truth"] if known else "", f"{good} of {len(ended)}", f"{bad}",
                      *_against(known, "trace"), *_against(known, "llc"), _foreseen(known),
                      _span([row["likeness"] for row in known]), *_covered(known)])  # fmt: skip
    head = ["problem", "truth", "good", "of these wrong", "trace K / truth", "errors off", "LLC / truth", "errors off",
            "foreseen bias", "likeness of R", *(f"{name} held" for name in HELD)]  # fmt: skip
    return (
        "## Bias\n\nPure defaults. Each run beside the truth of the very law it chose; ratios are mean ± standard "
        "deviation over seeds, *errors off* the median distance in stated standard errors. A good run is wrong where "
        "trace K or the LLC is off by more than 10 % and 3 stated errors, or R correlates less than .8 with the "
        "truth, or w\\* is no minimum. "
        "*Foreseen bias* is the run's own; the LLC's ratio less 1 is the true one, averaged over directions. "
        "*Held*: the per cent of truths within 1.96 errors that the run states (t of 3 degrees of freedom for V = "
        "trace K), of 32 samples' entries and of the runs' V and LLC.\n\n" + table(head, lines)
    )


def _against(rows: list[Row], name: str) -> tuple[str, str]:
    rows = [row for row in rows if row[name] is not None]
    ratios = [row[name] / row[f"true_{name}"] for row in rows]
    off = [
        (row[name] - row[f"true_{name}"]) / np.hypot(row[f"{name}_se"], row[f"true_{name}_se"])
        for row in rows
        if row[f"{name}_se"]
    ]
    return _span(ratios), f"{np.median(off):+.1f}" if off else ""


def _span(values: list[float]) -> str:
    if not values:
        return ""
    return f"{np.mean(values):.3f} ± {np.std(values):.3f}"


def _covered(rows: list[Row]) -> list[str]:
    """The shares held of each quantity, over runs, in per cent."""
    found = [[row["covered"][name] for row in rows if name in row.get("covered", {})] for name in HELD]
    return [f"{100 * np.mean(values):.0f}" if values else "" for values in found]


def _foreseen(rows: list[Row]) -> str:
    values = [row["foreseen_bias"] for row in rows if row.get("foreseen_bias") is not None]
    return f"{np.mean(values):+.3f}" if values else "none stated"
