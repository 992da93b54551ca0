"""Any similarity of N samples, read by blocks: a loss kernel, an [N, N] array, or [N, d] features by their cosines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from lossk.checks import check_tensor, refuse_non_finite, shown
from lossk.forms.blocks import tile_spans, upper_triangle

SIDE = 2048  # of the blocks that arrays and features are read in


class Pairs(Protocol):
    """Symmetric similarities of N samples. `dead` samples have none: what their entries hold means nothing."""

    num_samples: int
    side: int  # blocks aligned to multiples of it are read fastest
    dead: Tensor  # [N] bool

    def covariance(self, rows: slice, columns: slice) -> Tensor:
        """As given, with its own scale: [r, c] float64."""
        ...

    def correlation(self, rows: slice, columns: slice) -> Tensor:
        """With a diagonal of 1: [r, c] float64."""
        ...


class Kernel(Protocol):
    """What is read of a loss kernel; baselines have it too."""

    @property
    def num_samples(self) -> int: ...
    @property
    def tile(self) -> int: ...
    @property
    def dead(self) -> Tensor: ...
    @property
    def variance(self) -> Tensor: ...
    def correlation(self, rows: Any = ..., columns: Any = ...) -> Tensor: ...


class KernelPairs:
    """A loss kernel, or what can be read like one."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self.num_samples, self.side, self.dead = kernel.num_samples, kernel.tile, kernel.dead

    def covariance(self, rows: slice, columns: slice) -> Tensor:
        # K underflows in float32 where R does not, and R K_ii^(1/2) K_jj^(1/2) is K.
        std = self._kernel.variance.sqrt()
        return self.correlation(rows, columns) * std[rows].unsqueeze(1) * std[columns]

    def correlation(self, rows: slice, columns: slice) -> Tensor:
        return self._kernel.correlation(rows, columns).double()


class ArrayPairs:
    """A symmetric [N, N] array; its correlation form divides by the roots of the diagonal."""

    def __init__(self, array: Tensor) -> None:
        self._array = array
        self.num_samples, self.side = len(array), SIDE
        diagonal = array.diagonal().double()
        self.dead = ~(diagonal > 0)
        self._gain = torch.where(self.dead, 0.0, diagonal.clamp(min=1e-300).rsqrt())

    def covariance(self, rows: slice, columns: slice) -> Tensor:
        return self._array[rows, columns].double()

    def correlation(self, rows: slice, columns: slice) -> Tensor:
        return self.covariance(rows, columns) * self._gain[rows].unsqueeze(1) * self._gain[columns]


class FeaturePairs:
    """[N, d] features: x_i . x_j, and their cosines."""

    def __init__(self, features: Tensor) -> None:
        self._features = features
        self.num_samples, self.side = len(features), SIDE
        norm = torch.cat([part.double().norm(dim=1) for part in features.split(SIDE)])
        self.dead = ~(norm > 0)
        self._gain = torch.where(self.dead, 0.0, 1.0 / norm.clamp(min=1e-300))

    def covariance(self, rows: slice, columns: slice) -> Tensor:
        return self._features[rows].double() @ self._features[columns].double().T

    def correlation(self, rows: slice, columns: slice) -> Tensor:
        return self.covariance(rows, columns) * self._gain[rows].unsqueeze(1) * self._gain[columns]


def as_pairs(name: str, source: Kernel | Tensor | np.ndarray) -> Pairs:
    """A kernel, a symmetric [N, N] array, or [N, d] features.

    An array [N, N] that is not symmetric is refused; features with d = N are best passed as their Gram matrix.

    Raises:
        ValueError: another shape, or an entry that is not finite.
    """
    if not isinstance(source, type) and all(hasattr(source, part) for part in ("correlation", "num_samples", "tile")):
        return KernelPairs(cast(Kernel, source))
    if not isinstance(source, Tensor | np.ndarray | list | tuple):
        raise TypeError(f"{name} must be a LossKernel, a baseline or an array, got {shown(source)}")
    array = check_tensor(name, source, ("N", "N or d"), finite=False)
    array = array.cpu()
    for part in array.split(SIDE):
        refuse_non_finite(name, part)
    if array.shape[0] != array.shape[1]:
        return FeaturePairs(array)
    size = float(array.abs().max())
    if not all(torch.allclose(array[s], array[:, s].T, rtol=0, atol=1e-5 * size) for s in tile_spans(len(array), SIDE)):
        raise ValueError(f"{name} is [N, N] and must be symmetric")
    return ArrayPairs(array)


def spans_of(*several: Pairs) -> list[slice]:
    """How to cut the samples so that all of them are read in blocks: by the side of the first that is a kernel."""
    sides = [pairs.side for pairs in several if isinstance(pairs, KernelPairs)] or [SIDE]
    return tile_spans(several[0].num_samples, min(sides[0], 4 * SIDE))


def blocks(spans: list[slice]) -> Iterator[tuple[slice, slice]]:
    """The blocks of the upper triangle, row by row."""
    return ((spans[i], spans[j]) for i, j in upper_triangle(len(spans)))
