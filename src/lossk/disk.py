"""Files, folders and Zarr v3 groups as this package writes them: durable, in one step, a checksum per chunk."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import zarr
from zarr.codecs import Crc32cCodec
from zarr.errors import ZarrUserWarning

from lossk.errors import StoreError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def full_disk_named(path: Path | None) -> Iterator[None]:
    """Name the store in an error of a disk, or quota, that is full: the system's own names no file.

    Raises:
        StoreError: instead of such an OSError.
    """
    try:
        yield
    except OSError as error:
        if path is None or error.errno not in FULL:
            raise
        raise StoreError(
            f"out={str(path)!r} cannot be written on, its disk is full ({error.strerror}); what is committed is safe: "
            "make room, and go on with resume=True"
        ) from error


@contextmanager
def in_one_step(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Where to write what is to lie at `path`: beside it, and moved there when the block ends without an error.

    Raises:
        FileExistsError: `path` exists and `overwrite` is False.
        StoreError: `path` is not a store, or one that is being written.
    """
    if path.exists() and not overwrite:
        raise FileExistsError(f"path {str(path)!r} exists; nothing is overwritten")
    refuse_to_delete(path)
    parts = path.with_name(f".{path.name}.{os.getpid()}.part")
    _remove(parts)
    try:
        yield parts
        if path.exists():
            shutil.rmtree(path)
        parts.rename(path)
        sync(path.parent)
    finally:
        _remove(parts)


def refuse_to_delete(path: Path) -> None:
    """Raise StoreError unless a path may be overwritten: nothing is there, or a store that nobody is writing."""
    if not path.exists():
        return
    if not (path.is_dir() and (path / "zarr.json").exists()):
        raise StoreError(f"{str(path)!r} is not a .lossk store; it will not be overwritten")
    if (path / ".lock").exists():
        with (path / ".lock").open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise StoreError(f"{str(path)!r} is being written by another process") from error


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def create_array(
    group: zarr.Group,
    name: str,
    shape: tuple[int, ...],
    dtype: str,
    dimensions: tuple[str, ...],
    chunks: tuple[int, ...],
    *,
    overwrite: bool = False,
) -> zarr.Array:
    """An array whose every chunk is a file once written, zeros too: a chunk that is not there is one that was lost."""
    return group.create_array(
        name,
        shape=shape,
        dtype=dtype,
        chunks=tuple(min(chunk, size) for chunk, size in zip(chunks, shape, strict=True)),
        dimension_names=dimensions,
        compressors=[Crc32cCodec()],
        config={"write_empty_chunks": True},
        overwrite=overwrite,
    )


def consolidate(path: Path) -> None:
    """List the arrays in the group's own metadata: readers then need not list the folder and warn of other files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ZarrUserWarning)  # that the Zarr v3 specification leaves this to the library
        zarr.consolidate_metadata(path)
    sync(path / "zarr.json")


def sync_tree(path: Path) -> None:
    """fsync every file and folder under `path`."""
    for folder, _, files in os.walk(path):
        for name in files:
            sync(Path(folder) / name)
        sync(Path(folder))


def read_lines(path: Path) -> list[Any]:
    """The JSON of each line of a log, none where there is no log; a torn last line is not one."""
    if not path.exists():
        return []
    found = []
    for line in path.read_bytes().split(b"\n")[:-1]:  # every whole line ends in a newline
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file in one step, durably."""
    replace_file(path, json.dumps(content, indent=1, allow_nan=True).encode() + b"\n")


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise StoreError(f"{path.name} of {str(path.parent)!r} cannot be read: {error}") from error


def replace_file(path: Path, *content: bytes) -> None:
    """Write a file, or replace it, in one step, durably."""
    parts = path.with_name(f".{path.name}.part")
    with parts.open("wb") as file:
        for part in content:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    parts.replace(path)
    sync(path.parent)


def forget(path: Path) -> None:
    """Have the system give back the memory in which it keeps a durable file, where it can be told to."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def sync(path: Path) -> None:
    """fsync a file or a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
