"""From tiles of the upper triangle to the whole matrix, and to NumPy's view of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from lossk.available import available_bytes
from lossk.blocks import tile_spans
from lossk.read_memory import check_dense

if TYPE_CHECKING:
    from lossk.kernel import LossKernel

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


def write_dense(kernel: LossKernel, put: Put, *, correlation: bool) -> None:
    """Put every tile of the upper triangle in its place, and transposed in the other."""
    spans = tile_spans(kernel.num_samples, kernel.tile)
    tiles = kernel.correlation_tiles() if correlation else kernel.tiles()
    for i, j, tile in tiles:
        values = tile.numpy()
        if i == j:
            np.fill_diagonal(values, 1.0 if correlation else kernel.variance[spans[i]].float().numpy())
        put(spans[i], spans[j], values)
        if i != j:
            put(spans[j], spans[i], values.T)


def dense(kernel: LossKernel, *, correlation: bool) -> np.ndarray:
    """The whole matrix in memory: [N, N] float32."""
    n = kernel.num_samples
    refuse_too_large(n, n, "read blocks (kernel[rows, columns]) or iterate kernel.tiles()")
    check_dense(kernel._blocks)
    out = np.empty((n, n), dtype=np.float32)

    def put(rows: slice, columns: slice, tile: np.ndarray) -> None:
        out[rows, columns] = tile

    write_dense(kernel, put, correlation=correlation)
    return out
