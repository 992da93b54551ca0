"""The formulas of foreseen bias against the recursion of second moments, which shares nothing with them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lossk.diagnostics.bias import correction_strength, foreseen_bias


def stationary(s: float, r: float, averaged: bool, alpha: float) -> float:
    """Variance times curvature of x <- (1 - 2 s) x + (1 - alpha r / 2) noise + minibatch noise."""
    rho, q = 1 - 2 * s, 1 - alpha * r / 2
    keeps, draws = np.array([[rho, 0.0], [0.0, 0.0]]), np.array([[q * q + r, 0.0], [0.0, 0.0]])
    if averaged:  # of (x, xi_t): x' = rho x + q (xi_t + xi_{t+1}) / 2 + zeta
        keeps, draws = np.array([[rho, q / 2], [0.0, 0.0]]), np.array([[q * q / 4 + r, q / 2], [q / 2, 1.0]])
    moments = np.linalg.solve(np.eye(4) - np.kron(keeps, keeps), draws.ravel())
    return float(moments[0]) * 4 * s  # noise in units where lr is 1: the curvature is 4 s


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize(("s", "r", "alpha"), [(0.01, 0.05, 0.0), (0.3, 0.2, 0.0), (0.3, 0.2, 1.3), (0.7, 0.5, 1.0)])
def test_the_bias_of_the_worst_direction_is_that_of_the_recursion(
    averaged: bool, s: float, r: float, alpha: float
) -> None:
    grid = [(max(s * i / 20, 1e-6), r * j / 20) for i in range(20) for j in (0, 5, 10, 15, 20)] + [(s, 0.0), (s, r)]
    found = [abs(stationary(*place, averaged, alpha) - 1) for place in grid]
    foreseen = foreseen_bias(s, r, averaged=averaged, alpha=alpha)
    assert max(found) <= foreseen + 1e-5
    assert max(found) == pytest.approx(foreseen, rel=0.02)


def test_the_bias_without_correction_is_the_known_one() -> None:
    assert foreseen_bias(0.45, 0.25, averaged=True) == pytest.approx(0.25 / 0.55)
    assert foreseen_bias(0.24, 0.1, averaged=False) == pytest.approx(1.1 / 0.76 - 1)
    assert foreseen_bias(0.0, 0.0, averaged=True) == 0.0


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize(("s", "r"), [(0.0, 0.3), (0.05, 0.4), (0.3, 0.2), (0.6, 0.8), (0.3, 3.0)])
def test_no_other_strength_has_a_better_worst_case(averaged: bool, s: float, r: float) -> None:
    alpha, left = correction_strength(s, r, averaged=averaged)
    assert 0.0 < alpha <= 2.0 / r
    assert left == foreseen_bias(s, r, averaged=averaged, alpha=alpha)
    others = [foreseen_bias(s, r, averaged=averaged, alpha=2 / r * i / 1000) for i in range(1001)]
    assert left <= min(others) + 1e-9
    assert left <= foreseen_bias(s, r, averaged=averaged)


def test_what_remains_is_half_of_what_stability_adds_to_the_noise() -> None:
    s, r = 0.3, 0.2
    alpha, left = correction_strength(s, r, averaged=True)
    assert alpha == pytest.approx(2 * (1 - math.sqrt(1 - r * (1 + 1 / (1 - s)) / 2)) / r)
    assert left == pytest.approx(r * s / (1 - s) / 2)
    assert left < 0.05 < 0.28 < foreseen_bias(s, r, averaged=True)


def test_of_eulers_step_only_the_noise_is_taken() -> None:
    alpha, left = correction_strength(0.02, 0.3, averaged=False)
    assert left == pytest.approx(0.02 / 0.98)
    assert alpha == pytest.approx(2 * (1 - math.sqrt(1 - 0.3)) / 0.3)
    assert left < 0.03 < 0.3 < foreseen_bias(0.02, 0.3, averaged=False)


@pytest.mark.parametrize(
    ("s", "r", "alpha", "named"), [(1.0, 0.1, 0.0, "s"), (-0.1, 0.1, 0.0, "s"), (math.nan, 0.1, 0.0, "s"),
    (0.1, -1.0, 0.0, "r"), (0.1, math.nan, 0.0, "r"), (0.1, 0.1, -1.0, "alpha"), (0.1, 0.1, math.nan, "alpha")],
)  # fmt: skip
def test_arguments_are_named(s: float, r: float, alpha: float, named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named} must be"):
        foreseen_bias(s, r, averaged=True, alpha=alpha)
