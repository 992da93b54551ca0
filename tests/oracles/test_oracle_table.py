"""The table of docs/oracles.md in its quick form: every row within its error, and a wrong law refused."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from bench import oracles as table
from bench import oracles_hmc, oracles_linear, oracles_nonlinear
from bench.oracle_problems import Row


def agrees(rows: list[Row], least_rms: float = 0.0) -> bool:
    """Every |z| below 4.5 and their rms within [least_rms, 1.6]; False for NaN."""
    return all(abs(row.z) < 4.5 for row in rows) and least_rms <= table.rms(rows) <= 1.6


CASES = list(table.CASES)


@functools.cache
def rows_of(number: int) -> list[Row]:
    """A case of the table, made once for all tests."""
    return CASES[number](table.quick().part(number))


@pytest.mark.parametrize("number", range(len(CASES)), ids=[case.__name__ for case in CASES])
def test_every_row_is_within_its_error(number: int) -> None:
    assert all(abs(row.z) < 4.5 for row in rows_of(number)), [(row.quantity, row.z) for row in rows_of(number)]


@pytest.mark.long("makes every case where it is run alone")
def test_the_table_is_within_its_errors() -> None:
    rows = [row for number in range(len(CASES)) for row in rows_of(number)]
    assert agrees(rows, least_rms=0.5), [(row.oracle, row.quantity, row.z) for row in rows]
    assert len(rows) >= 30
    text = table.page(rows, table.quick(), 1.0)
    assert text.count("\n| T") == len(rows)
    assert "nan" not in text


def test_not_a_number_is_refused() -> None:
    assert not agrees([Row("T0", "x", 1.0, float("nan"), 0.1)])
    assert not agrees([Row("T0", "x", 1.0, 1.0, float("nan"))])
    assert agrees([Row("T0", "x", 1.0, 1.1, 0.1)])


def test_the_law_without_discretisation_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracles_linear, "BIASED", lambda a, lr: np.linalg.inv(a))
    assert not agrees(oracles_linear.t2(table.quick()))


def test_another_exponent_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    law: Any = oracles_nonlinear.singular_model
    monkeypatch.setattr(oracles_nonlinear, "singular_model", lambda gamma, eps: law(0.7 * gamma if eps else gamma, eps))
    assert not agrees(oracles_nonlinear.t7(table.quick()))


RANK_ZERO = {(2, 2, 2): 1.5, (5, 4, 5): 8.0, (4, 3, 8): 6.0, (8, 3, 4): 6.0, (3, 8, 4): 6.0}  # Aoyagi, Watanabe 2005


@pytest.mark.parametrize(("shape", "limit"), RANK_ZERO.items())
def test_reduced_rank_regression_tends_to_its_learning_coefficient(shape: tuple[int, int, int], limit: float) -> None:
    assert abs(oracles_hmc.rank_zero_llc(shape, 1e24, 1.0) - limit) < 1e-3


def test_an_odd_reduced_rank_regression_nears_its_learning_coefficient_with_the_logarithm() -> None:
    """(5, 3, 5) has multiplicity 2: n_beta L tends to 6.5 - 1 / ln n_beta."""
    misses = [6.5 - oracles_hmc.rank_zero_llc((5, 3, 5), 10.0**k, 1.0) for k in (24, 48)]
    np.testing.assert_allclose(misses, [1 / (k * np.log(10.0)) for k in (24, 48)], rtol=0.1)


def test_scaling_the_loss_against_n_beta_changes_rounding_only() -> None:
    assert oracles_nonlinear.same_noise_gap(table.quick()) < 1e-6
