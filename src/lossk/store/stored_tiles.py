"""The tiles of a store: one Zarr chunk per tile of the upper triangle, written once, read when asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lossk.disk.chunks import ArraySpec, ChunkError, Chunks, Digests
from lossk.disk.files import Digest
from lossk.errors import StoreError
from lossk.forms.blocks import TileBlocks, upper_triangle
from lossk.store.opened import OpenStore

CACHE_BYTES = 256 * 2**20

Key = tuple[int, int]


def create_tiles(
    store: Path, num_samples: int, side: int, dtype: str, *, compressed: bool,
    known: MutableMapping[str, Digest] | None = None,
) -> Chunks:  # fmt: skip
    """The array `tiles` [N, N] of a store, new: chunks of [side, side], of which only the upper triangle is written."""
    shape = (num_samples, num_samples)
    spec = ArraySpec.of(shape, dtype, ("row", "column"), (side, side), compressed=compressed)
    return Chunks.create(store, "tiles", spec, known)


def write_tiles(store: Path, blocks: TileBlocks) -> dict[str, Digest]:
    """Write all tiles of a finished kernel, to be synced; the digests of their files."""
    known: dict[str, Digest] = {}
    begin_tiles(store, blocks, str(blocks.dtype).removeprefix("torch."), known)
    return known | write_own_tiles(store, blocks)


def begin_tiles(store: Path, blocks: TileBlocks, dtype: str, known: MutableMapping[str, Digest] | None = None) -> None:
    """The array of a finished kernel's tiles, for every process of the run to write some into."""
    side = min(blocks.tile, blocks.num_samples)
    create_tiles(store, blocks.num_samples, side, dtype, compressed=False, known=known)


def write_own_tiles(store: Path, blocks: TileBlocks) -> dict[str, Digest]:
    """Write this process's tiles into the array that has begun, to be synced; the digests of their files."""
    known: dict[str, Digest] = {}
    array = Chunks.open(store, "tiles")
    for key, tile in blocks.tiles.items():
        known[array.key(key)] = array.write(key, tile.cpu().numpy(), durable=False)
    return known


def chunk_path(store: Path, key: Key) -> Path:
    """The file of one tile."""
    return store / "tiles" / "c" / str(key[0]) / str(key[1])


class StoredTiles(Mapping[Key, Tensor]):
    """Tiles read from the store when asked for; those used last are kept, as many as fit into `cache_bytes`.

    Args:
        known: the digests of tiles that were just written to it.

    Raises:
        StoreError: here, that there are none; later, that the tile asked for is missing or fails its checksum.
    """

    def __init__(
        self, store: Path, side: int, cache_bytes: int = CACHE_BYTES, *, known: Digests | None = None,
        opened: OpenStore | None = None,
    ) -> None:  # fmt: skip
        self._path, self._store = store, opened
        self._array = Chunks.open(store, "tiles", known) if opened is None else opened.array("tiles")
        spec = self._array.spec
        self._count = -(-spec.shape[0] // side)
        self._kept = max(cache_bytes // spec.chunk_bytes, 1)
        self._cache: dict[Key, Tensor] = {}

    @classmethod
    def of(cls, store: OpenStore) -> StoredTiles:
        """Those of a finished store."""
        side = min(store.config["tile"], store.config["num_samples"])
        return cls(store.path, side, opened=store)

    def __getitem__(self, key: Key) -> Tensor:
        tile = self._cache.pop(key, None)
        if tile is None:
            while len(self._cache) >= self._kept:
                del self._cache[next(iter(self._cache))]
            tile = torch.from_numpy(self._read(key))
        self._cache[key] = tile  # a dict keeps the order of insertion: the one used last is last
        return tile

    def _read(self, key: Key) -> np.ndarray:
        what = f"tile {key[0]}, {key[1]} of {str(self._path)!r}"
        if self._store is not None:
            return self._store.read_chunk(self._array, key, what)
        try:
            return self._array.read(key)
        except ChunkError as error:
            raise StoreError(error.says(what)) from error

    def __iter__(self) -> Iterator[Key]:
        return upper_triangle(self._count)

    def __len__(self) -> int:
        return self._count * (self._count + 1) // 2
