"""tile += rows_i' rows_j: the contribution of a panel's centred, scaled rows to one tile of the kernel."""

from __future__ import annotations

from torch import Tensor


def rank_update(tile: Tensor, rows_i: Tensor, rows_j: Tensor) -> None:
    """Add the product of two column blocks of a panel to a tile, in place.

    A plain matrix product is at the machine's GEMM peak on a CPU, so the reference is also the CPU's fast path.
    2 a b (k+1) flops; reads and writes the tile once.

    Args:
        tile: [a, b] float32, changed in place.
        rows_i: [k+1, a] float32, centred and scaled losses of the tile's rows.
        rows_j: [k+1, b] float32, the same of its columns.
    """
    tile.addmm_(rows_i.T, rows_j)
