"""What a finished store consists of: `checksums.json`, and `complete`, which appears in one step once all is durable.

`checksums.json` has bytes and CRC-32C of every file, as [bytes, crc]; of a chunk, without the checksum that it ends
with. Whoever reads a store checks each file against it: so a file that is lost, changed, or of another store is found.
A store of an earlier version has none; its chunks' own checksums are then all that can be checked.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lossk.disk.chunks import CRC_BYTES, ArraySpec, At, ChunkError, Chunks, Digests
from lossk.disk.files import (
    Digest,
    digest,
    naming,
    read_file,
    remove,
    replace_file,
    sync,
    sync_tree,
    to_json,
)
from lossk.disk.sealed import LOG_BYTES, read_sealed, write_sealed
from lossk.errors import StoreError

MANIFEST = "checksums.json"
COMPLETE = "complete"
COMPLETE_SPEC = ArraySpec((1,), "int8", ("format",), (1,))
MOMENTS = ("variance", "mean", "scale", "lag1", "chain_mean")
WATCHED_ARRAYS = ("watched", "watched_losses")  # beside tiles; a store of an earlier version has neither
NAMES_ARRAYS = ("ids", "labels")  # where whoever made the kernel gave them
ARRAYS = ("losses", *MOMENTS, "tokens", *NAMES_ARRAYS, *WATCHED_ARRAYS, "tiles", "factor")
DESCRIPTIONS = ("zarr.json", "config.json", "commits.jsonl")


def is_complete(path: Path) -> bool:
    """Whether a store is finished: not one whose run, of an earlier version, was killed while it said so."""
    mark = path / COMPLETE
    return mark.is_dir() and ((path / MANIFEST).exists() or all((mark / at).exists() for at in ("zarr.json", "c/0")))


def written(chunks: Chunks) -> Iterable[At]:
    """The chunks that an array has: of `tiles`, those of the upper triangle."""
    return (at for at in chunks.spec.grid() if chunks.name != "tiles" or at[0] <= at[1])


def finish_store(path: Path, known: Digests) -> None:
    """Say of a store, all of which is durable but its `zarr.json`, what it consists of, and that it is complete.

    Args:
        known: of files that were written before: they must still be the same.

    Raises:
        StoreError: a file is missing, or is not the one that was written.
    """
    names = [name for name in ARRAYS if (path / name).is_dir()]
    describe_group(path, names, {COMPLETE: COMPLETE_SPEC})
    files = {name: digest_of(path / name) for name in DESCRIPTIONS if (path / name).exists()}
    for name in names:
        files |= digests_of(Chunks.open(path, name))
    for key, found in files.items():
        if tuple(known.get(key, found)) != found:
            raise StoreError(f"{str(path / key)!r} is not the file that was written: it was changed meanwhile")
    part = path / f".{COMPLETE}.part"
    remove(path / COMPLETE)  # by half, of a run of an earlier version
    for key, found in write_array(path, part.name, np.ones(1, np.int8), COMPLETE_SPEC).items():
        files[key.replace(part.name, COMPLETE)] = found
    sync_tree(part)
    write_sealed(path / MANIFEST, {"files": files})
    with naming(path / COMPLETE):
        os.rename(part, path / COMPLETE)
    sync(path)


def write_array(path: Path, name: str, values: np.ndarray, spec: ArraySpec) -> dict[str, Digest]:
    """A new array of a store, of these values, to be synced; returns the digests of its files."""
    known: dict[str, Digest] = {}
    chunks = Chunks.create(path, name, spec, known)
    return known | chunks.write_all(values)


def describe_group(
    path: Path, names: Iterable[str], more: Mapping[str, ArraySpec] | None = None, attributes: Any = None
) -> None:
    """Write the group's own `zarr.json`, which lists its arrays: readers then need not list the folder."""
    specs = {name: Chunks.open(path, name).spec for name in names} | dict(more or {})
    content: dict[str, Any] = {"attributes": attributes or {}, "zarr_format": 3, "node_type": "group"}
    if specs:
        arrays = {name: specs[name].metadata() for name in sorted(specs)}
        content["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": arrays}
    replace_file(path / "zarr.json", to_json(path / "zarr.json", content))


def digest_of(file: Path) -> Digest:
    """Of a whole file.

    Raises:
        StoreError: it is missing, or cannot be read.
    """
    try:
        return digest(read_file(file, LOG_BYTES))
    except FileNotFoundError as error:
        raise StoreError(f"{str(file)!r} is missing") from error


def digests_of(chunks: Chunks) -> dict[str, Digest]:
    """Of an array's files: its description, and what every chunk says of itself."""
    found = {f"{chunks.name}/zarr.json": digest_of(chunks.path / chunks.name / "zarr.json")}
    return found | {chunks.key(at): digest_of_chunk(chunks.file(at)) for at in written(chunks)}


def digest_of_chunk(file: Path) -> Digest:
    """Of a chunk, as it says itself: only its end is read.

    Raises:
        ChunkError: it is missing.
    """
    try:
        with file.open("rb") as content:
            size = content.seek(0, os.SEEK_END) - CRC_BYTES
            content.seek(max(size, 0))
            return size, int.from_bytes(content.read(), "little")
    except FileNotFoundError as error:
        raise ChunkError(file) from error


def read_manifest(path: Path) -> dict[str, Digest] | None:
    """The digests of a finished store's files; None in a store of an earlier version.

    Raises:
        StoreError: they are damaged.
    """
    if not (path / MANIFEST).exists():
        return None
    files = read_sealed(path / MANIFEST).get("files")
    if not isinstance(files, dict) or not all(
        isinstance(found, list) and len(found) == 2 and all(type(number) is int for number in found)
        for found in files.values()
    ):
        raise StoreError(f"{MANIFEST} of {str(path)!r} cannot be read: it lists no files")
    return {key: (size, crc) for key, (size, crc) in files.items()}
