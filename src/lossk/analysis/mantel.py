"""Mantel tests: is a similarity of classes related to another, beyond what relabelling the classes would show?"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from lossk.analysis.class_matrix import Array
from lossk.analysis.inputs import check_list, check_seed, check_square
from lossk.checks import check_choice, check_integer

EXACT = 50_000  # permutations up to which all are tried: 8 classes have 40,320
BATCH = 512
MOST_ENTRIES = 4_000_000  # of a batch of relabelled matrices: 1,000 classes have half a million pairs
SIDES = ("greater", "two-sided")
MOST_PERMUTATIONS = 10**7  # each keeps its order of the classes, 8 C bytes
SLACK = 1e-12  # relabellings that leave the statistic as it is must count, whatever rounding does


class Mantel(NamedTuple):
    """A Mantel test."""

    statistic: float  # (partial) Spearman correlation of the entries above the diagonal
    p: float
    permutations: int
    exact: bool  # every relabelling of the classes was tried


def mantel(
    a: Array,
    b: Array,
    *,
    controls: Sequence[Array] = (),
    alternative: str = "two-sided",
    num_permutations: int = 9999,
    seed: int = 0,
) -> Mantel:
    """Mantel's test (1967) of two symmetric [C, C] similarities, with ranks; partial if there are controls.

    The statistic is Spearman's correlation over the C (C - 1) / 2 pairs; with controls, that of the residuals of both
    ranks after least squares on the controls' ranks (Smouse, Long, Sokal 1986). The classes of `a` are relabelled, the
    rest stays. All C! relabellings where they are at most 50,000, and then p is the share that reach the statistic;
    else `num_permutations` random ones, and p = (1 + those that reach it) / (1 + num_permutations).

    A partial test does not hold its level where `a` and `b` each have structure of their own that the controls share
    only in part (Guillot and Rousset 2013): read a small p with that in mind. Where nothing varies: NaN, and p = 1.
    """
    alternative = check_choice("alternative", alternative, SIDES)
    num_permutations = check_integer("num_permutations", num_permutations, 1, MOST_PERMUTATIONS)
    seed = check_seed(seed)
    a, *others = _same_size(a, b, controls)
    count = len(a)
    upper = np.triu_indices(count, 1)
    ranks = np.zeros((count, count))
    ranks[upper] = rankdata(a[upper])
    ranks += ranks.T
    basis = _basis([rankdata(x[upper]) for x in others[1:]], len(upper[0]))
    target = _residual(rankdata(others[0][upper])[None], basis)[0]
    statistic = float(_correlate(ranks[upper][None], target, basis)[0])
    exact = math.factorial(count) <= EXACT
    orders = _all_orders(count) if exact else _random_orders(count, num_permutations, seed)
    if not math.isfinite(statistic):
        return Mantel(statistic, 1.0, len(orders), exact)
    reached, batch = 0, max(1, min(BATCH, MOST_ENTRIES // len(upper[0])))
    for start in range(0, len(orders), batch):
        order = orders[start : start + batch]
        found = _correlate(ranks[order[:, upper[0]], order[:, upper[1]]], target, basis)
        if alternative == "two-sided":
            reached += int((np.abs(found) >= abs(statistic) - SLACK).sum())
        else:
            reached += int((found >= statistic - SLACK).sum())
    p = reached / len(orders) if exact else (1 + reached) / (1 + len(orders))
    return Mantel(statistic, p, len(orders), exact)


def _same_size(a: Array, b: Array, controls: Sequence[Array]) -> list[Array]:
    """Matrices [C, C] float64, C at least 3, finite off the diagonal."""
    check_list("controls", controls, "matrices [C, C]")
    given = {"a": a, "b": b, **{f"controls[{i}]": x for i, x in enumerate(controls)}}
    found = {name: check_square(name, x, least=3) for name, x in given.items()}
    sizes = {name: len(x) for name, x in found.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"{', '.join(sizes)} must be [C, C] of the same classes, got {list(sizes.values())} of them")
    for name, x in found.items():
        if not np.isfinite(x[np.triu_indices(len(x), 1)]).all():
            raise ValueError(f"{name} must be finite above the diagonal")
    return list(found.values())


def partial_spearman(a: Array, b: Array, controls: Sequence[Array]) -> float:
    """The statistic of `mantel` alone."""
    a, b, *controls = _same_size(a, b, controls)
    upper = np.triu_indices(len(a), 1)
    basis = _basis([rankdata(x[upper]) for x in controls], len(upper[0]))
    target = _residual(rankdata(b[upper])[None], basis)[0]
    return float(_correlate(rankdata(a[upper])[None], target, basis)[0])


def _basis(columns: Sequence[Array], length: int) -> Array:
    """Orthonormal columns that span the constant and the controls."""
    full = np.stack([np.ones(length), *columns], axis=1)
    left, size, _ = np.linalg.svd(full, full_matrices=False)
    return np.asarray(left[:, size > 1e-10 * size[0]])


def _residual(rows: Array, basis: Array) -> Array:
    return np.asarray(rows - (rows @ basis) @ basis.T)


def _correlate(rows: Array, target: Array, basis: Array) -> Array:
    """Correlation of each row's residual with the target's; NaN where there is none."""
    left = _residual(rows, basis)
    size, of_target = np.linalg.norm(left, axis=1), np.linalg.norm(target)
    least = 1e-9 * np.linalg.norm(rows, axis=1)  # ranks, as the target's were: what is left below it is rounding
    enough = (size > least) & (of_target > least)
    return np.where(enough, left @ target / np.where(enough, size * of_target, 1.0), np.nan)


def _all_orders(count: int) -> NDArray[np.int64]:
    return np.array(list(itertools.permutations(range(count))), dtype=np.int64)


def _random_orders(count: int, number: int, seed: int) -> NDArray[np.int64]:
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    return rng.permuted(np.tile(np.arange(count), (number, 1)), axis=1)
