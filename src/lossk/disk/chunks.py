"""Arrays of a store: Zarr v3, a file per chunk with a checksum, written and read by the file.

Any Zarr reader opens them. They are not read by way of Zarr itself, to which a chunk that is lost is one of zeros, a
description is right whatever it says, and the size of what is decompressed is known only afterwards. Here a chunk that
is not there is an error, and so is one that is not what was written, or not of the size that its array says.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from lossk.disk.files import (
    Bytes,
    Digest,
    digest,
    make_folders,
    parse_json,
    read_buffer,
    read_file,
    remove,
    replace_file,
    to_json,
    write_file,
)
from lossk.errors import StoreError
from lossk.optional import require

At = tuple[int, ...]
Region = tuple[slice, ...]
Digests = Mapping[str, Digest]  # of files, by their path within the store; of a chunk, without its own checksum

DTYPES = ("float16", "float32", "float64", "int8", "int64")
# Of a covariance only exponents and signs compress, bit planes that LZ4 finds as well as Zstandard does, in a third of
# its time: 13 % of float32 is saved, 8 % of float16. Higher levels take larger buffers.
CNAME, CLEVEL = "lz4", 1
CRC_BYTES = 4  # after every chunk: CRC-32C of what is before it
HEADER_BYTES = 16  # of a Blosc buffer, which says what it holds
BLOSC_BYTES = 2**31 - 1  # the most that one holds
SPEC_BYTES = 2**16  # the largest description of an array
CODECS = {"endian": "little"}


def _blosc() -> Any:
    """The codec, whose library is a store's alone: not loaded when lossk is imported."""
    return require("numcodecs.blosc", None, "a store").Blosc


@dataclass(frozen=True)
class ArraySpec:
    """What an array's `zarr.json` says."""

    shape: tuple[int, ...]
    dtype: str
    dimensions: tuple[str, ...]
    chunks: tuple[int, ...]
    compressed: bool = False
    attributes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        shape: tuple[int, ...],
        dtype: str,
        dimensions: tuple[str, ...],
        chunks: tuple[int, ...],
        *,
        compressed: bool = False,
        attributes: dict[str, Any] | None = None,
    ) -> ArraySpec:
        """With chunks no larger than the array."""
        chunks = tuple(min(chunk, size) for chunk, size in zip(chunks, shape, strict=True))
        return cls(shape, dtype, dimensions, chunks, compressed, attributes or {})

    @property
    def item_bytes(self) -> int:
        return np.dtype(self.dtype).itemsize

    @property
    def chunk_bytes(self) -> int:
        """Of a chunk's numbers."""
        return math.prod(self.chunks) * self.item_bytes

    @property
    def file_bytes(self) -> int:
        """The largest file of a chunk."""
        return self.chunk_bytes + CRC_BYTES + (2**12 if self.compressed else 0)

    def grid(self) -> Iterator[At]:
        """The coordinates of all chunks."""
        return _cells(tuple(-(-size // chunk) for size, chunk in zip(self.shape, self.chunks, strict=True)))

    def region(self, at: At) -> Region:
        """The entries of a chunk."""
        return tuple(
            slice(c * chunk, min((c + 1) * chunk, size))
            for c, chunk, size in zip(at, self.chunks, self.shape, strict=True)
        )

    def metadata(self) -> dict[str, Any]:
        """As Zarr v3 has it. To other readers a lost chunk of floats is NaN, but in `tiles`, half of which is empty."""
        numbers: dict[str, Any] = {"name": "bytes"}
        if self.item_bytes > 1:
            numbers["configuration"] = CODECS
        packed = {"typesize": self.item_bytes, "cname": CNAME, "clevel": CLEVEL, "shuffle": "bitshuffle"}
        blosc = [{"name": "blosc", "configuration": {**packed, "blocksize": 0}}] if self.compressed else []
        nothing = 0.0 if self.dimensions == ("row", "column") else "NaN"
        return {
            "shape": list(self.shape),
            "data_type": self.dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(self.chunks)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": nothing if self.dtype.startswith("float") else 0,
            "codecs": [numbers, *blosc, {"name": "crc32c"}],
            "attributes": self.attributes,
            "dimension_names": list(self.dimensions),
            "zarr_format": 3,
            "node_type": "array",
            "storage_transformers": [],
        }


def parse_spec(plain: Any, what: str) -> ArraySpec:
    """An array's description, read; `what` names it.

    Raises:
        StoreError: it is none, or one that this package does not write.
    """
    try:
        shape, chunks = tuple(plain["shape"]), tuple(plain["chunk_grid"]["configuration"]["chunk_shape"])
        names = [codec["name"] for codec in plain["codecs"]]
        little = plain["codecs"][0].get("configuration", CODECS) == CODECS
        spec = ArraySpec(
            shape, plain["data_type"], tuple(plain.get("dimension_names") or ()), chunks, "blosc" in names,
            dict(plain["attributes"]),
        )  # fmt: skip
        whole = all(type(size) is int and 1 <= size < 2**48 for size in (*shape, *chunks))
        known = names in (["bytes", "crc32c"], ["bytes", "blosc", "crc32c"]) and little and spec.dtype in DTYPES
        keys = plain["chunk_key_encoding"] == {"name": "default", "configuration": {"separator": "/"}}
        regular = plain["chunk_grid"]["name"] == "regular" and len(shape) == len(chunks) == len(spec.dimensions)
        kind = (plain["zarr_format"], plain["node_type"], plain.get("storage_transformers", [])) == (3, "array", [])
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise StoreError(f"{what} cannot be read: {error!r}") from error
    if not (whole and known and keys and regular and kind):
        raise StoreError(f"{what} cannot be read: it is not as lossk writes it")
    return spec


class ChunkError(StoreError):
    """A chunk that cannot be read: `missing`, or damaged as `reason` says."""

    def __init__(self, path: Path, reason: str | None = None) -> None:
        self.path, self.missing, self.reason = path, reason is None, reason
        super().__init__(f"{path} is missing" if reason is None else f"{path} is damaged: {reason}")

    def says(self, what: str) -> str:
        """The same of the chunk by a name that people know."""
        return f"{what} is missing: there is no {self.path}" if self.missing else (
            f"{what} is damaged: {self.reason} ({self.path})"
        )  # fmt: skip


class Chunks:
    """An array `name` of the store at `path`.

    Args:
        known: of the files that were written: what is read must be the same.
        whole: what is not in `known`, if that is given, was never written.
    """

    def __init__(
        self, path: Path, name: str, spec: ArraySpec, known: Digests | None = None, *, whole: bool = False
    ) -> None:
        self.path, self.name, self.spec = path, name, spec
        self.known: Digests = {} if known is None else known
        self._whole = whole and known is not None

    @classmethod
    def create(cls, path: Path, name: str, spec: ArraySpec, known: MutableMapping[str, Digest] | None = None) -> Chunks:
        """A new array, in place of one that is there."""
        remove(path / name)
        make_folders(path / name, durable=False)
        content = to_json(path / name / "zarr.json", spec.metadata())
        write_file(path / name / "zarr.json", content)
        if known is not None:
            known[f"{name}/zarr.json"] = digest(content)
        return cls(path, name, spec)

    @classmethod
    def open(cls, path: Path, name: str, known: Digests | None = None, *, whole: bool = False) -> Chunks:
        """An array that is there.

        Raises:
            StoreError: it is missing, or is not described as it was.
        """
        file, at = path / name / "zarr.json", f"{name}/zarr.json"
        what = f"the store's array {name!r} in {str(path)!r}"
        try:
            content = read_file(file, SPEC_BYTES)
        except FileNotFoundError as error:
            raise StoreError(f"{what} is missing: there is no {at}") from error
        if known is not None and known.get(at, None if whole else digest(content)) != digest(content):
            raise StoreError(f"{what} is damaged: {at} is not what was written")
        return cls(path, name, parse_spec(parse_json(content, at), f"{what}: {at}"), known, whole=whole)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape

    @property
    def chunks(self) -> tuple[int, ...]:
        return self.spec.chunks

    def key(self, at: At) -> str:
        """The file of a chunk, within the store."""
        return "/".join((self.name, "c", *map(str, at)))

    def file(self, at: At) -> Path:
        return self.path / self.key(at)

    # --- writing

    def encode(self, values: np.ndarray) -> tuple[Bytes, bytes]:
        """What the file of a chunk holds: its numbers, perhaps compressed, and their checksum."""
        spec = self.spec
        if values.shape != spec.chunks:  # the chunks of a Zarr array are all of a size
            padded = np.zeros(spec.chunks, dtype=spec.dtype)
            padded[tuple(slice(size) for size in values.shape)] = values
            values = padded
        values = np.ascontiguousarray(values, dtype=np.dtype(spec.dtype).newbyteorder("<"))
        content: Bytes = values.data.cast("B")
        if spec.compressed:
            content = _blosc()(cname=CNAME, clevel=CLEVEL, shuffle=_blosc().BITSHUFFLE).encode(values)
        return content, digest(content)[1].to_bytes(CRC_BYTES, "little")

    def digest(self, values: np.ndarray) -> Digest:
        """Of the chunk of these numbers, as `write` would return it."""
        return digest(self.encode(values)[0])

    def write(self, at: At, values: np.ndarray, *, durable: bool = True) -> Digest:
        """Write a chunk; one that is not durable is to be synced with its array."""
        content, crc = self.encode(values)
        file = self.file(at)
        make_folders(file.parent, durable=durable)
        if durable:
            replace_file(file, content, crc)
        else:
            write_file(file, content, crc)
        return len(content), int.from_bytes(crc, "little")

    def write_all(self, values: np.ndarray) -> dict[str, Digest]:
        """Write all chunks, to be synced with the array."""
        return {self.key(at): self.write(at, values[self.spec.region(at)], durable=False) for at in self.spec.grid()}

    # --- reading

    def is_there(self, at: At) -> bool:
        return self.file(at).is_file()

    def read(self, at: At) -> np.ndarray:
        """The entries of a chunk that lie within the array.

        Raises:
            ChunkError: it is missing, or not what was written.
        """
        spec, content = self.spec, self._content(at)
        values = np.frombuffer(self._unpacked(at, content) if spec.compressed else content, dtype=spec.dtype)
        return values.reshape(spec.chunks)[tuple(slice(side.stop - side.start) for side in spec.region(at))]

    def _unpacked(self, at: At, content: memoryview) -> Any:
        """A Blosc buffer's bytes, which says beforehand how many they are."""
        file, size = self.file(at), self.spec.chunk_bytes
        held, packed = (int.from_bytes(content[i : i + 4], "little") for i in (4, 12))
        if len(content) < HEADER_BYTES or (held, packed) != (size, len(content)):
            raise ChunkError(file, f"it holds {held} bytes of numbers, the array's chunks have {size}")
        _require_memory(file, size)
        try:
            return _blosc()().decode(content, np.empty(size, dtype=np.uint8))
        except (RuntimeError, ValueError) as error:
            raise ChunkError(file, str(error)) from error

    def _content(self, at: At) -> memoryview:
        """A chunk's file less its checksum, once that is right."""
        spec, file = self.spec, self.file(at)
        try:
            content = memoryview(read_buffer(file, spec.file_bytes))
        except FileNotFoundError as error:
            raise ChunkError(file) from error
        except StoreError as error:
            raise ChunkError(file, str(error)) from error
        content, crc = content[:-CRC_BYTES], content[-CRC_BYTES:]
        found = digest(content)
        if len(crc) < CRC_BYTES or found[1] != int.from_bytes(crc, "little"):
            raise ChunkError(file, "Stored and computed checksum do not match")
        if not spec.compressed and len(content) != spec.chunk_bytes:
            raise ChunkError(file, f"it has {len(content)} bytes of numbers, the array's chunks {spec.chunk_bytes}")
        written = self.known.get(self.key(at), None if self._whole else found)
        if written is None:
            raise ChunkError(file, "it was never written")
        if tuple(written) != found:
            raise ChunkError(file, "it is not the one that was written there")
        return content

    def read_all(self) -> np.ndarray:
        """The whole array.

        Raises:
            ChunkError: some chunk is missing, or not what was written.
        """
        spec = self.spec
        for at in spec.grid():  # before there is memory for what they hold: a shape alone is cheap to write
            if not self.is_there(at):
                raise ChunkError(self.file(at))
        _require_memory(self.path / self.name, math.prod(spec.shape) * spec.item_bytes)
        out = np.empty(spec.shape, dtype=spec.dtype)
        for at in spec.grid():
            out[spec.region(at)] = self.read(at)
        return out


def _cells(counts: tuple[int, ...]) -> Iterator[At]:
    """Row by row; lazily, however many are said to be there."""
    if not counts:
        yield ()
        return
    for i in range(counts[0]):
        for rest in _cells(counts[1:]):
            yield (i, *rest)


def _require_memory(path: Path, needed: int) -> None:
    """Raise StoreError where what a description promises is more than memory holds."""
    free = psutil.virtual_memory().available
    if needed > free:
        raise StoreError(f"{str(path)!r} says that it holds {needed} bytes, and {free} bytes of memory are free")
