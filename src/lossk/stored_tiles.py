"""The tiles of a store: one Zarr chunk per tile of the upper triangle, written once, read when asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import torch
import zarr
from numcodecs.blosc import Blosc
from torch import Tensor
from zarr.codecs import BloscCodec, Crc32cCodec

from lossk.blocks import TileBlocks, upper_triangle
from lossk.errors import StoreError

CACHE_BYTES = 256 * 2**20
# Every chunk is written, also one of zeros only: one that is missing is then one that was lost.
WRITE_ALL: Any = {"write_empty_chunks": True}
CHECKED = [Crc32cCodec()]
# As `encode_tile` writes it. Of a covariance only exponents and signs compress, bit planes that LZ4 finds as well as
# Zstandard does, in a third of its time: 13 % of float32 is saved, 8 % of float16. Higher levels take larger buffers.
CNAME: Any = "lz4"
CLEVEL = 1
COMPRESSED = [BloscCodec(cname=CNAME, clevel=CLEVEL, shuffle="bitshuffle"), Crc32cCodec()]


def create_tiles(group: zarr.Group, num_samples: int, side: int, dtype: str, compressors: Sequence[Any]) -> zarr.Array:
    """The array `tiles` [N, N] of a store, new: chunks of [side, side], of which only the upper triangle is written."""
    return group.create_array(
        "tiles",
        shape=(num_samples, num_samples),
        dtype=dtype,
        chunks=(side, side),
        dimension_names=("row", "column"),
        compressors=compressors,
        config=WRITE_ALL,
        overwrite=True,
    )


def write_tile(array: zarr.Array, side: int, key: tuple[int, int], tile: Tensor) -> None:
    """Write one tile, [a, b] of the array's dtype."""
    rows, columns = (k * side for k in key)
    array[rows : rows + tile.shape[0], columns : columns + tile.shape[1]] = tile.cpu().numpy()


def write_tiles(group: zarr.Group, blocks: TileBlocks) -> None:
    """Write all tiles of a finished kernel."""
    side = min(blocks.tile, blocks.num_samples)
    dtype = str(blocks.dtype).removeprefix("torch.")
    array = create_tiles(group, blocks.num_samples, side, dtype, CHECKED)
    for key, tile in blocks.tiles.items():
        write_tile(array, side, key, tile)


def encode_tile(side: int, tile: Tensor) -> tuple[bytes, bytes]:
    """The chunk of one tile, as `COMPRESSED` has it: what is compressed, and its checksum.

    Zarr would write the same bytes, by way of its pool of threads, in which the copies that it makes pile up: for tiles
    of 4 MB more than 30 MB, where a memory budget has room for a few.
    """
    values = tile.numpy()
    if values.shape != (side, side):  # the chunks of a Zarr array are all of a size
        values = np.zeros((side, side), dtype=values.dtype)
        values[: tile.shape[0], : tile.shape[1]] = tile.numpy()
    content = Blosc(cname=CNAME, clevel=CLEVEL, shuffle=Blosc.BITSHUFFLE).encode(values)
    return content, google_crc32c.value(content).to_bytes(4, "little")


def chunk_path(store: Path, key: tuple[int, int]) -> Path:
    """The file of one tile."""
    return store / "tiles" / "c" / str(key[0]) / str(key[1])


class StoredTiles(Mapping[tuple[int, int], Tensor]):
    """Tiles read from the store when asked for; those used last are kept, as many as fit into `cache_bytes`.

    Raises:
        StoreError: here, that there are none; later, that the tile asked for is missing or fails its checksum.
    """

    def __init__(self, store: Path, side: int, cache_bytes: int = CACHE_BYTES) -> None:
        self._store, self._side = store, side
        try:
            self._array = zarr.open_array(store / "tiles", mode="r")
        except (FileNotFoundError, ValueError) as error:
            raise StoreError(f"the store's array 'tiles' is missing: {error}") from error
        array = self._array
        self._count = -(-array.shape[0] // side)
        self._kept = max(cache_bytes // (side * side * array.dtype.itemsize), 1)
        self._cache: dict[tuple[int, int], Tensor] = {}

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        tile = self._cache.pop(key, None)
        if tile is None:
            while len(self._cache) >= self._kept:
                del self._cache[next(iter(self._cache))]
            tile = torch.from_numpy(self._read(key))
        self._cache[key] = tile  # a dict keeps the order of insertion: the one used last is last
        return tile

    def _read(self, key: tuple[int, int]) -> np.ndarray:
        if not chunk_path(self._store, key).exists():  # Zarr would read zeros
            raise StoreError(f"tile {key[0]}, {key[1]} of {str(self._store)!r} is missing")
        i, j = (k * self._side for k in key)
        try:
            return np.asarray(self._array[i : i + self._side, j : j + self._side])
        except (ValueError, OSError, RuntimeError) as error:
            raise StoreError(f"tile {key[0]}, {key[1]} of {str(self._store)!r} is damaged: {error}") from error

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return upper_triangle(self._count)

    def __len__(self) -> int:
        return self._count * (self._count + 1) // 2
