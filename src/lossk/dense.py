"""From tiles of the upper triangle to the whole matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from lossk.blocks import tile_spans

if TYPE_CHECKING:
    from lossk.kernel import LossKernel

Put = Callable[[slice, slice, np.ndarray], None]  # rows, columns, [a, b] float32


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
