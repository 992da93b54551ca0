"""Section 2: what the verdict says of planted faults, and what they did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from bench.calibration_faults import CLEAN, NEVER, faults
from bench.calibration_problems import problem
from bench.calibration_runs import SMALL, run
from bench.markdown import table

Row = dict[str, Any]


def measure(seeds: Iterable[int], small: bool = False) -> Iterator[list[Row]]:
    """All rows so far, after each fault."""
    rows: list[Row] = []
    for number, fault in enumerate(faults()):
        if small and number:
            return
        of = problem(fault.problem)
        for seed in seeds:
            try:
                found = run(of, fault.sampler(of, seed), seed=seed, **(SMALL if small else fault.settings))
            except (ValueError, RuntimeError) as error:
                found = {"problem": of.name, "verdict": f"refused: {type(error).__name__}", "advice": str(error)[:200]}
            rows.append(found | {"fault": fault.name, "seed": seed, "may_be_good": fault.good})
        yield rows


def mistaken(row: Row) -> bool:
    """Whether it is called good and is not."""
    return row["verdict"] == "good" and (row["may_be_good"] == NEVER or bool(row.get("wrong")))


def section(record: Row) -> str:
    """Markdown."""
    rows = record["rows"]
    lines = []
    for key in dict.fromkeys((row["fault"], row["problem"]) for row in rows):
        part = [row for row in rows if (row["fault"], row["problem"]) == key]
        known = [row for row in part if "truth" in row]
        verdicts = ", ".join(f"{name} {count}" for name, count in Counter(row["verdict"] for row in part).most_common())
        errors = Counter(name for row in known for name in row["wrong"])
        lines.append([*key, verdicts, _ratio(known, "trace"), _ratio(known, "llc"), _like(known),
                      ", ".join(f"{name} {count}" for name, count in errors.items()),
                      f"{sum(map(mistaken, part))}"])  # fmt: skip
    clean = [row for row in rows if row["may_be_good"] == CLEAN]
    bad, good = sum(map(mistaken, rows)), sum(row["verdict"] == "good" for row in rows)
    head = ["fault", "problem", "verdicts", "trace K / truth", "LLC / truth", "likeness of R",
            "off by more than stated", "good and wrong"]  # fmt: skip
    return (
        f"## Verdicts\n\n{len(lines)} cases, {len(rows)} runs: **{bad} are called good and are wrong**, of "
        f"{good} called good; {sum(row['verdict'] != 'good' for row in clean)} "
        f"of {len(clean)} clean runs are not called good. Wrong is trace K or the LLC off by more than 10 % and 3 "
        "stated errors, R correlating less than .8 with the truth, or a w\\* that is no minimum, or chains that never "
        "move. Ratios are medians (least to most) over seeds.\n\n" + table(head, lines)
    )


def _ratio(rows: list[Row], name: str) -> str:
    return _range([row[name] / row[f"true_{name}"] for row in rows if row[name] is not None])


def _like(rows: list[Row]) -> str:
    return _range([row["likeness"] for row in rows])


def _range(values: list[float]) -> str:
    values = [value for value in values if np.isfinite(value)]
    return f"{np.median(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else ""
