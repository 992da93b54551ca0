"""From tiles of the upper triangle to the whole matrix, and to NumPy's view of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from lossk.available import available_bytes
from lossk.forms.blocks import tile_spans

ROWS_AT_A_TIME = 1024  # of a tile, in float64 products
Tiles = Iterator[tuple[int, int, Tensor]]  # (i, j, [a, b] float32) of the upper triangle, i <= j
Put = Callable[[slice, slice, np.ndarray], None]  # rows, columns, [a, b] float32
FREE_SHARE = 0.9  # of the free memory, that a whole matrix may take


class AsArray:
    """NumPy's protocol for a matrix that is made when asked for: `np.asarray(kernel)`, scikit-learn's "precomputed"."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        """2."""
        return 2

    def to_numpy(self) -> np.ndarray:
        """The whole matrix, float32."""
        raise NotImplementedError

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """`to_numpy()`, with its limit on the size.

        Raises:
            ValueError: copy=False, since there is no matrix that could be shared.
        """
        if copy is False:
            raise ValueError("copy must be None or True: the matrix is made when asked for, got False")
        return self.to_numpy().astype(np.float32 if dtype is None else dtype, copy=False)

    def __iter__(self) -> NoReturn:
        """A row costs a pass over the tiles of its row: whoever wants rows says which."""
        raise TypeError(
            f"a {type(self).__name__} is not iterated row by row; read blocks, kernel[rows, columns], or the whole "
            "matrix, np.asarray(kernel)"
        )


def refuse_too_large(rows: int, columns: int, instead: str) -> None:
    """Raise MemoryError, with the sizes, where a float32 matrix would not fit into free memory."""
    needed, free = 4 * rows * columns, available_bytes()
    if needed > FREE_SHARE * free:
        raise MemoryError(
            f"the {rows} x {columns} matrix needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are available; "
            f"{instead}"
        )


@dataclass(frozen=True)
class Whole:
    """A symmetric matrix [N, N] as it is made, a tile of its upper triangle at a time."""

    tiles: Tiles
    diagonal: Tensor  # [N] float32, which takes the place of the tiles' own
    tile: int  # side

    def __len__(self) -> int:
        return len(self.diagonal)


def write_dense(whole: Whole, put: Put) -> None:
    """Put every tile of the upper triangle in its place, and transposed in the other."""
    spans = tile_spans(len(whole), whole.tile)
    for i, j, tile in whole.tiles:
        values = tile.numpy()
        if i == j:
            np.fill_diagonal(values, whole.diagonal[spans[i]].numpy())
        put(spans[i], spans[j], values)
        if i != j:
            put(spans[j], spans[i], values.T)


def dense(whole: Whole) -> np.ndarray:
    """The whole matrix in memory: [N, N] float32."""
    n = len(whole)
    out = np.empty((n, n), dtype=np.float32)

    def put(rows: slice, columns: slice, tile: np.ndarray) -> None:
        out[rows, columns] = tile

    write_dense(whole, put)
    return out


def times(tiles: Tiles, spans: Sequence[slice], v: Tensor) -> Tensor:
    """The matrix times v [N, m] float64, a tile at a time."""
    out = torch.zeros_like(v)
    for i, j, tile in tiles:
        rows, columns = spans[i], spans[j]
        for start in range(0, len(tile), ROWS_AT_A_TIME):
            part = tile[start : start + ROWS_AT_A_TIME].double()
            here = slice(rows.start + start, rows.start + start + len(part))
            out[here] += part @ v[columns]
            if i != j:
                out[columns] += part.T @ v[here]
    return out
