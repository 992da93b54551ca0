"""The curvature of the steepest draw of a thousand, from a few dozen, against laws whose quantiles are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lossk.curvature.curvature import steepness
from lossk.pilot.effort import FULL

LAW = 200_000


def log_normal(spread: float, count: int) -> Tensor:
    return (spread * torch.randn(count, dtype=torch.float64)).exp()


def singular(count: int) -> Tensor:
    """a^2 + b^2 under exp(-17 a^2 b^2 - (a^2 + b^2) / 2): f = a b x around 0; b given a is normal, a by rejection."""
    a = torch.randn(12 * count, dtype=torch.float64)
    a = a[torch.rand(len(a), dtype=torch.float64) < (1 / (1 + 34 * a.square())).sqrt()][:count]
    assert len(a) == count
    return a.square() + (torch.randn(count, dtype=torch.float64) / (1 + 34 * a.square()).sqrt()).square()


@pytest.mark.parametrize("law", ["0.05", "0.2", "0.4", "singular"])
def test_the_steepest_draw_is_foreseen_from_few(law: str) -> None:
    """In the median over sets of draws no lower than 0.9 of the truth, and at most half as much again above it."""

    def drawn(count: int) -> Tensor:
        return singular(count) if law == "singular" else log_normal(float(law), count)

    every = drawn(LAW)
    truth = float(every.quantile(0.999) / every.mean())
    found = sorted(steepness(each) for each in drawn(400 * FULL.glances).view(400, FULL.glances))
    assert 0.9 * truth < found[200] < 1.5 * truth
    assert found[40] > 0.5 * truth


def test_draws_that_are_alike_or_unknown_are_no_steeper() -> None:
    same = torch.full((5,), 3.0, dtype=torch.float64)
    assert steepness(same) == pytest.approx(1.0)
    assert steepness(torch.cat([same, torch.full((2,), math.nan, dtype=torch.float64)])) == pytest.approx(1.0)
    assert steepness(torch.full((4,), math.nan)) == 1.0
    assert steepness(torch.zeros(4)) == 1.0
    assert steepness(torch.tensor([0.0, 0.0, 0.0, 8.0])) == pytest.approx(4.0)
