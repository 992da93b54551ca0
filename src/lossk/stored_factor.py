"""The factor form read from its store, a chunk of samples at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import zarr
from torch import Tensor

from lossk.blocks import FactorBlocks
from lossk.errors import StoreError

KEPT = 2  # chunks in memory: a tile's two sides


class StoredFactor(FactorBlocks):
    """A factor [D, N] on disk in chunks [D, tile]; the last two chunks read are kept, as float32.

    Memory beyond the N moments: 8 D tile bytes for these, one more of the same in float64 products, and whatever the
    caller asks for. Chunks are checked against their checksums whenever they are read.
    """

    in_memory = False

    def __init__(self, array: zarr.Array, freedom: int, path: Path) -> None:
        self.path, self.freedom = path, freedom
        self.num_rows, self.num_samples = array.shape
        self.tile = array.chunks[1]
        self._array = array
        self._kept: dict[int, Tensor] = {}

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, str(self._array.dtype))

    def stripe(self, i: int) -> Tensor:
        if i in self._kept:
            self._kept[i] = self._kept.pop(i)  # the latest comes last
            return self._kept[i]
        while len(self._kept) >= KEPT:
            del self._kept[next(iter(self._kept))]
        self._kept[i] = torch.from_numpy(self._read(i)).float()
        return self._kept[i]

    def _read(self, i: int) -> np.ndarray:
        if not (self.path / "factor" / "c" / "0" / str(i)).exists():  # Zarr would read zeros
            raise StoreError(f"chunk {i} of the factor in {str(self.path)!r} is missing")
        try:
            return np.asarray(self._array[:, i * self.tile : (i + 1) * self.tile])
        except (ValueError, OSError) as error:
            raise StoreError(f"chunk {i} of the factor in {str(self.path)!r} is damaged: {error}") from error

    def take(self, index: Tensor) -> Tensor:
        out = torch.empty(self.num_rows, len(index), dtype=torch.float32, device="cpu")
        chunk = index // self.tile
        for i in chunk.unique().tolist():
            at = (chunk == i).nonzero().squeeze(1)
            out[:, at] = self.stripe(i)[:, index[at] - i * self.tile]
        return out
