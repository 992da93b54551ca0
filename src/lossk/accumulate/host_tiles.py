"""Tiles in host memory, updated on a device that does not have the room for them.

Centered, scaled rows of draws wait on the device until there are enough of them; then every tile visits it once, takes
in all of them in one product, and goes back. With all draws of a run waiting each tile makes one journey.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lossk.accumulate.tiles import TileAccumulator, add_rows
from lossk.device import pinned


class HostTiles(TileAccumulator):
    """What `TileAccumulator` does, with the tiles in host memory; moments and rows are on `device`.

    Args:
        waiting: rows of draws that wait on the device at most; at least 1.
    """

    def __init__(self, *arguments: Any, waiting: int, **options: Any) -> None:
        assert waiting >= 1
        super().__init__(*arguments, **options)
        self._most, self._waiting = waiting, 0
        self._rows: list[Tensor] = []

    def _zeros(self, i: int, j: int) -> Tensor:
        rows, columns = self.spans[i], self.spans[j]
        shape = rows.stop - rows.start, columns.stop - columns.start
        return pinned(torch.zeros(shape, dtype=torch.float32, device="cpu"))

    def _add_rows(self, rows: Tensor, precision: str) -> None:
        if precision != self.precision:  # the last rows of the pooled centering
            self._flush(self.precision)
        self._rows.append(rows)
        self._waiting += len(rows)
        if self._waiting >= self._most or precision != self.precision:
            self._flush(precision)

    def _multiply(self, factor: Tensor) -> None:
        self._flush(self.precision)  # rows that wait are in units of the old scale
        factor = factor.float().cpu()
        for (i, j), tile in self.tiles.items():
            tile *= factor[self.spans[i]].unsqueeze(1)
            tile *= factor[self.spans[j]]

    def _flush(self, precision: str) -> None:
        if not self._rows:
            return
        rows = self._rows[0] if len(self._rows) == 1 else torch.cat(self._rows)
        for (i, j), tile in self.tiles.items():
            visiting = tile.to(self.device, copy=True)
            left, right = rows[:, self.spans[i]], rows[:, self.spans[j]]
            add_rows(visiting, (i, j), left, right, backend=self.backend, precision=precision)
            tile.copy_(visiting)
        self._rows, self._waiting = [], 0
