"""The factor form read from its store, a chunk of samples at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lossk.disk.chunks import ChunkError, Chunks
from lossk.errors import StoreError
from lossk.forms.blocks import FactorBlocks
from lossk.store.opened import OpenStore

KEPT = 2  # chunks in memory: a tile's two sides


class StoredFactor(FactorBlocks):
    """A factor [D, N] on disk in chunks [D, tile]; the last two chunks read are kept, as float32.

    Memory beyond the N moments: 8 D tile bytes for these, one more of the same in float64 products, and whatever the
    caller asks for. Chunks are checked against their checksums whenever they are read.

    Args:
        store: that it is of; None while that is still being written.
    """

    in_memory = False

    def __init__(self, array: Chunks, freedom: int, path: Path, store: OpenStore | None = None) -> None:
        self.path, self.freedom = path, freedom
        self.num_rows, self.num_samples = array.shape
        self.tile = array.chunks[1]
        self._array, self._store = array, store
        self._kept: dict[int, Tensor] = {}

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self._array.spec.dtype)

    def source(self) -> OpenStore:
        """Its store, to be copied.

        Raises:
            StoreError: another one lies in its place.
        """
        if self._store is not None:
            self._store.check()
            return self._store
        store = OpenStore(self.path)
        if any(store.known is None or store.known.get(key) != found for key, found in self._array.known.items()):
            raise StoreError(f"{str(self.path)!r} is not the store that this kernel was written to; open it again")
        return store

    def stripe(self, i: int) -> Tensor:
        if i in self._kept:
            self._kept[i] = self._kept.pop(i)  # the latest comes last
            return self._kept[i]
        while len(self._kept) >= KEPT:
            del self._kept[next(iter(self._kept))]
        self._kept[i] = torch.from_numpy(self._read(i)).float()
        return self._kept[i]

    def _read(self, i: int) -> np.ndarray:
        what = f"chunk {i} of the factor in {str(self.path)!r}"
        if self._store is not None:
            return self._store.read_chunk(self._array, (0, i), what)
        try:
            return self._array.read((0, i))
        except ChunkError as error:
            raise StoreError(error.says(what)) from error

    def take(self, index: Tensor) -> Tensor:
        out = torch.empty(self.num_rows, len(index), dtype=torch.float32, device="cpu")
        chunk = index // self.tile
        for i in chunk.unique().tolist():
            at = (chunk == i).nonzero().squeeze(1)
            out[:, at] = self.stripe(i)[:, index[at] - i * self.tile]
        return out
