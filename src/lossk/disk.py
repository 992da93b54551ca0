"""Zarr v3 groups as this package writes them: named dimensions, a checksum per chunk, in place in one step."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import zarr
from zarr.codecs import Crc32cCodec
from zarr.errors import ZarrUserWarning

from lossk.store import refuse_to_delete, sync


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
