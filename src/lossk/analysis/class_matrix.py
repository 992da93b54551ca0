"""A [C, C] matrix between classes with the replicates that give it, and whatever is computed from it, error bars."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lossk.analysis.inputs import check_square
from lossk.checks import check_callable, check_number, check_optional, check_tensor
from lossk.records import check_record

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A number with two standard errors; NaN where a replicate is missing."""

    value: float
    image_error: float  # had other images been drawn from the same classes
    chain_error: float  # had the sampler's chains been others

    def __post_init__(self) -> None:
        check_record(self)


@dataclass(frozen=True)
class ClassMatrix:
    """A symmetric similarity of classes.

    `images` are bootstrap replicates over images, drawn class by class in `groups` groups (one image each where there
    are few); `chains` are those with one chain left out. None where there are none, as for a single given matrix.
    """

    matrix: Array  # [C, C]
    images: Array | None = None  # [B, C, C]
    groups: int = 0  # per class; the bootstrap's variance is (groups - 1) / groups of what it should be
    chains: Array | None = None  # [chains, C, C]

    def __post_init__(self) -> None:
        check_record(self)
        check_square("matrix", self.matrix)
        for name in ("images", "chains"):
            check_optional(check_tensor, name, getattr(self, name), ("R", *self.matrix.shape), finite=False, at_least=0)

    @property
    def image_error(self) -> Array | None:
        """[C, C] standard errors over images."""
        return None if self.images is None else _bootstrap_error(self.images, self.groups)

    @property
    def chain_error(self) -> Array | None:
        """[C, C] standard errors over chains, by the jackknife; of C chains the error itself is known to about
        1 / sqrt(2 (C - 1))."""
        return None if self.chains is None else _jackknife_error(self.chains)

    def estimate(self, statistic: Callable[[Array], float]) -> Estimate:
        """statistic(matrix), with standard errors from its spread over the replicates."""
        check_callable("statistic", statistic, "a function of a matrix [C, C]")
        nan = float("nan")
        value = _number(statistic(self.matrix))
        images = nan if self.images is None else _bootstrap_error(_each(statistic, self.images), self.groups)
        chains = nan if self.chains is None else _jackknife_error(_each(statistic, self.chains))
        return Estimate(value, float(images), float(chains))


def as_class_matrix(name: str, given: ClassMatrix | Array, num_classes: int) -> ClassMatrix:
    """A `ClassMatrix` of that many classes, or an array [C, C] made one; symmetric, finite off the diagonal."""
    matrix = given if isinstance(given, ClassMatrix) else ClassMatrix(check_square(name, given))
    values = matrix.matrix
    if values.shape != (num_classes, num_classes):
        raise ValueError(f"{name} must be [{num_classes}, {num_classes}], got {list(values.shape)}")
    off = ~np.eye(num_classes, dtype=bool)
    if not np.isfinite(values[off]).all():
        raise ValueError(f"{name} must be finite off the diagonal: has every class a live sample?")
    if not np.allclose(values, values.T, rtol=1e-9, atol=1e-12, equal_nan=True):
        raise ValueError(f"{name} must be symmetric; of a confusion matrix take (M + M') / 2")
    return matrix


def _number(value: Any) -> float:
    """NaN where nothing varies is an answer too."""
    if isinstance(value, float | np.floating):
        return float(value)
    return check_number("statistic", value, "a function that returns a number")


def _each(statistic: Callable[[Array], float], replicates: Array) -> Array:
    return np.array([_number(statistic(replicate)) for replicate in replicates])


def _bootstrap_error(values: Array, groups: int) -> Array:
    return np.asarray(values.std(axis=0, ddof=1) * (groups / (groups - 1)) ** 0.5)


def _jackknife_error(values: Array) -> Array:
    count = len(values)
    return np.asarray(((count - 1) / count * np.square(values - values.mean(axis=0)).sum(axis=0)) ** 0.5)
