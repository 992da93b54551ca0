"""The targets of `bench.gpu`, and whether its rows meet them: plain arithmetic on what was measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]  # op, name, median_ms, of_limit, peak_bytes

ADDMM, PRODUCT = "torch.addmm_", "torch: product, then add_"  # of halves it adds a product to float32 in two calls
OVER_ADDMM = 1.7  # times as fast as torch in the same precision, which moves and computes both triangles
OF_LIMIT = 0.9  # of the GEMM rate or, of few rows, of the copy bandwidth, counting half the square
OF_COPY = 0.85  # of the copy bandwidth
OF_LOGITS = 0.1  # of the bytes of the logits that are not formed


@dataclass(frozen=True)
class Verdict:
    """One target, what was measured, and whether that meets it."""

    op: str
    target: str
    found: float
    met: bool

    def __str__(self) -> str:
        return f"{'met   ' if self.met else 'MISSED'} {self.op}: {self.target}; measured {self.found:.3g}"


def judge(rows: Sequence[Row], logit_bytes: Mapping[str, float]) -> list[Verdict]:
    """Every target that the rows can decide; what failed meets none.

    Args:
        logit_bytes: op -> bytes of the logits that a `head_loss` case does not form.
    """
    by_op: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_op.setdefault(row["op"], {})[row["name"]] = row
    return [verdict for op, contenders in by_op.items() for verdict in _of(op, contenders, logit_bytes)]


def _of(op: str, contenders: Mapping[str, Row], logit_bytes: Mapping[str, float]) -> Iterator[Verdict]:
    ran = {name: row for name, row in contenders.items() if row["median_ms"] is not None}
    if "lossk" not in ran:
        yield Verdict(op, "runs", math.nan, False)
        return
    ours = ran["lossk"]
    others = {name: row["median_ms"] for name, row in ran.items() if name != "lossk"}
    if op.startswith("rank_update"):
        for name in (each for each in (ADDMM, PRODUCT) if each in others):
            gain = others[name] / ours["median_ms"]
            yield Verdict(op, f"at least {OVER_ADDMM} times as fast as {name}", gain, gain >= OVER_ADDMM)
        share = ours["of_limit"]
        yield Verdict(op, f"at least {OF_LIMIT:.0%} of its limit, bytes or flops", share, share >= OF_LIMIT)
    if op.startswith("head_loss") and others:
        gain = min(others.values()) / ours["median_ms"]
        fastest = min(others, key=lambda name: others[name])
        yield Verdict(op, f"no slower than the fastest other ({fastest})", gain, gain >= 1.0)
    if op.startswith("head_loss"):
        share = ours["peak_bytes"] / logit_bytes[op]
        yield Verdict(op, f"at most {OF_LOGITS:.0%} of the logits' memory", share, share <= OF_LOGITS)
    if op.startswith("sgld_step"):
        share = ours["of_limit"]
        yield Verdict(op, f"at least {OF_COPY:.0%} of the copy bandwidth", share, share >= OF_COPY)
