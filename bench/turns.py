"""Contenders take turns, round after round, so that a machine that slows down slows them all."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

Turn = dict[str, float]  # "seconds", and whatever else a contender says of its turn
Quantiles = dict[str, float]

# The processor's time of the process: what a machine that others use at the same time says most about a contender.
CLOCKS: Mapping[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def take_turns(contenders: Mapping[str, Callable[[], Turn]], rounds: int) -> dict[str, list[Turn]]:
    """Every contender's turns, [rounds] each. Whoever needs warming up has been warmed up before."""
    turns: dict[str, list[Turn]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name, contender in contenders.items():
            turn = contender()
            turns[name].append(turn)
            print(f"round {number + 1} of {rounds}: {name} {turn['seconds']:.3f} s", file=sys.stderr, flush=True)
    return turns


def column(turns: Sequence[Turn], key: str = "seconds") -> list[float]:
    """One figure of every turn."""
    return [turn[key] for turn in turns]


def quantiles(values: Sequence[float]) -> Quantiles:
    """Median, and the 20 and 80 percentiles."""
    p20, median, p80 = np.percentile(values, [20, 50, 80])
    return {"median": float(median), "p20": float(p20), "p80": float(p80)}


def ratio(above: Sequence[float], below: Sequence[float]) -> Quantiles:
    """Quantiles of the ratio within each round: what slows a whole round down cancels."""
    return quantiles([a / b for a, b in zip(above, below, strict=True)])
