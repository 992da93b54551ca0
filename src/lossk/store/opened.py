"""A finished store as it is read: what it consists of, checked, and whether it is still the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lossk.disk.chunks import CRC_BYTES, ArraySpec, At, ChunkError, Chunks
from lossk.disk.files import digest, read_file, read_json, sync_tree, write_file
from lossk.disk.sealed import MARK, read_sealed
from lossk.errors import StoreError
from lossk.store.description import check_description, check_group, check_spec
from lossk.store.earlier import ZeroChunks, dead_chunks, find_zeros
from lossk.store.manifest import ARRAYS, COMPLETE, COMPLETE_SPEC, DESCRIPTIONS, MANIFEST, MOMENTS, read_manifest

COPY_BYTES = 2**34  # the largest file of an earlier version's store that is copied

Identity = tuple[int, int, int, int]


class OpenStore:
    """A finished store: its description, its arrays, and the checksums of its files (None in an earlier version's).

    Raises:
        StoreError: something that describes it is missing, or is not what was written.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._identity = path, identity(path)
        group = read_json(path / "zarr.json")
        self.config = read_sealed(path / "config.json")
        check_description(path, self.config)
        self.known = read_manifest(path)
        if self.known is None and MARK in self.config:
            raise StoreError(f"the checksums of {str(path)!r} are missing: there is no {MANIFEST}")
        for name in ("zarr.json", "config.json"):
            self.check_file(name)
        self.specs: dict[str, ArraySpec] = {}
        for name in ARRAYS:
            if (path / name).is_dir() or f"{name}/zarr.json" in (self.known or {}):
                self.specs[name] = Chunks.open(path, name, self.known, whole=True).spec
                check_spec(path, self.config, name, self.specs[name])
        mark = Chunks.open(path, COMPLETE, self.known, whole=True)
        if mark.spec.shape != COMPLETE_SPEC.shape or self.all_of(mark)[0] != 1:
            raise StoreError(f"the store's array {COMPLETE!r} in {str(path)!r} is damaged")
        check_group(path, group, self.specs)

    def check_file(self, name: str) -> None:
        """Raise StoreError unless a file that is no chunk is what was written."""
        if self.known is not None and name not in self.known:
            raise StoreError(f"{name} of {str(self.path)!r} is not listed in {MANIFEST}")
        self.read_file(name)

    def read_file(self, name: str) -> bytes:
        """A file as it is, checked.

        Raises:
            StoreError: it is missing, or not what was written.
        """
        what = f"{name} of {str(self.path)!r}"
        written = None if self.known is None else self.known.get(name)
        try:
            content = read_file(self.path / name, COPY_BYTES if written is None else written[0] + CRC_BYTES)
        except FileNotFoundError as error:
            raise StoreError(f"{what} is missing") from error
        own = content[:-CRC_BYTES] if "/c/" in name else content
        if written is not None and digest(own) != written:
            raise StoreError(f"{what} is damaged: it does not fit its checksum in {MANIFEST}")
        return content

    def array(self, name: str) -> Chunks:
        """One of its arrays.

        Raises:
            StoreError: it has none of that name.
        """
        if name not in self.specs:
            raise StoreError(f"the store's array {name!r} in {str(self.path)!r} is missing")
        kind = Chunks if self.known is not None else ZeroChunks
        return kind(self.path, name, self.specs[name], self.known, whole=self.known is not None)

    def read(self, name: str) -> np.ndarray:
        """All of an array, which is not one of the moments.

        Raises:
            StoreError: a chunk is missing, or not what was written.
        """
        array = self.array(name)
        if isinstance(array, ZeroChunks) and name == "tokens" and self.config["num_samples"] == 1:
            array.zeros = frozenset({(0, 0)})  # sample 0, position 0
        return self.all_of(array)

    def read_moments(self) -> dict[str, np.ndarray]:
        """`MOMENTS`.

        Raises:
            StoreError: a chunk of them is missing, or not what was written.
        """
        arrays = {name: self.array(name) for name in MOMENTS}
        earlier = {name: array for name, array in arrays.items() if isinstance(array, ZeroChunks)}
        try:
            if earlier:
                find_zeros(earlier)
        except ChunkError as error:
            raise StoreError(error.says("the store's array 'scale'")) from error
        return {name: self.all_of(array) for name, array in arrays.items()}

    def factor(self, variance: np.ndarray) -> Chunks:
        """The array `factor`, which in an earlier version lacks chunks of samples that never varied."""
        array = self.array("factor")
        if isinstance(array, ZeroChunks) and "factor_chunk" not in self.config:
            array.zeros = dead_chunks(array, variance == 0)
        return array

    def all_of(self, array: Chunks) -> np.ndarray:
        """All of one of its arrays."""
        try:
            values = array.read_all()
        except ChunkError as error:
            raise self.failed(error, f"the store's array {array.name!r} in {str(self.path)!r}") from error
        self.check()
        return values

    def read_chunk(self, array: Chunks, at: At, what: str) -> np.ndarray:
        """A chunk, by a name that people know.

        Raises:
            StoreError: it is missing, not what was written, or of a store that has come in this one's place.
        """
        try:
            values = array.read(at)
        except ChunkError as error:
            raise self.failed(error, what) from error
        if self.known is None:
            self.check()
        return values

    def failed(self, error: ChunkError, what: str) -> StoreError:
        """What to say of a chunk that could not be read."""
        try:
            self.check()
        except StoreError as replaced:
            return replaced
        return StoreError(error.says(what))

    def check(self) -> None:
        """Raise StoreError where another store has come in this one's place."""
        try:
            same = identity(self.path) == self._identity
        except StoreError:
            same = False
        if not same:
            raise StoreError(f"{str(self.path)!r} was replaced while it was open, or removed; open it again")


def identity(path: Path) -> Identity:
    """What tells a finished store from one that is moved into its place."""
    try:
        found = (path / "zarr.json").stat()
    except OSError as error:
        raise StoreError(f"zarr.json of {str(path)!r} is missing") from error
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def copy_store(store: OpenStore, path: Path) -> None:
    """Copy a finished store into an empty folder, durably, each file checked on the way."""
    for name in files_of(store):
        content = store.read_file(name)
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        write_file(path / name, content)
    store.check()
    sync_tree(path)


def files_of(store: OpenStore) -> list[str]:
    """What a copy of it consists of."""
    if store.known is not None:
        return [*store.known, MANIFEST]
    arrays = [at for name in (*store.specs, COMPLETE) for at in (store.path / name).rglob("*") if at.is_file()]
    descriptions = [store.path / name for name in DESCRIPTIONS if (store.path / name).exists()]
    return [str(file.relative_to(store.path)) for file in (*descriptions, *arrays)]
