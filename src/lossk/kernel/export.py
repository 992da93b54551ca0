"""The whole N x N matrix on disk, for other tools: dense Zarr or .npy, written a tile at a time."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from lossk.disk.chunks import ArraySpec, Chunks
from lossk.disk.files import naming, sync_tree
from lossk.disk.swap import Parts, in_one_step
from lossk.kernel.dense import Whole, write_dense
from lossk.store.contents import Contents
from lossk.store.manifest import describe_group, write_array


def write_zarr(contents: Contents, whole: Whole, path: Path, *, correlation: bool) -> None:
    """Write a Zarr v3 group of `covariance` (or `correlation`) [N, N] float32, one chunk per tile, and [N] float64
    `variance` and `mean_loss`: dimensions "row" and "column", a checksum per chunk."""
    refuse_too_large(len(whole), path)
    name = "correlation" if correlation else "covariance"
    with in_one_step(path) as parts:
        n, side, moments = len(whole), whole.tile, contents.moments
        units = {"units": "1" if correlation else "nats^2"}
        spec = ArraySpec.of((n, n), "float32", ("row", "column"), (side, side), attributes=units)
        matrix = Chunks.create(parts, name, spec)
        for label, values in (("variance", moments.variance), ("mean_loss", moments.mean)):
            write_array(parts, label, values.numpy(), ArraySpec.of((n,), "float64", ("row",), (2**20,)))

        def put(rows: slice, columns: slice, tile: np.ndarray) -> None:
            matrix.write((rows.start // side, columns.start // side), tile, durable=False)

        write_dense(whole, put)
        describe_group(parts, [name, "variance", "mean_loss"], attributes=attributes(contents))
        sync_tree(parts)


def write_npy(whole: Whole, path: Path) -> np.memmap:
    """Write an .npy file [N, N] float32, and open it as a read-only memory map.

    Written by position, not through the map: pages of a map that are written count as the process's memory.
    """
    if os.path.lexists(path):
        raise FileExistsError(f"path {str(path)!r} exists; nothing is overwritten")
    refuse_too_large(len(whole), path)
    n, parts = len(whole), Parts(path, folder=False)
    try:
        with naming(path), parts.path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (n, n)})
            file.flush()
            start = file.tell()
            file.truncate(start + 4 * n * n)

            def put(rows: slice, columns: slice, tile: np.ndarray) -> None:
                for row, line in zip(range(rows.start, rows.stop), np.ascontiguousarray(tile, "<f4"), strict=True):
                    _write_all(file.fileno(), line.tobytes(), start + 4 * (n * row + columns.start))

            write_dense(whole, put)
            os.fsync(file.fileno())
        parts.place()
    finally:
        parts.close()
    return np.load(path, mmap_mode="r", allow_pickle=False)


def refuse_too_large(num_samples: int, path: Path) -> None:
    """Raise OSError, with the sizes, where the matrix does not fit onto the disk."""
    folder = path.resolve().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"path {str(path)!r} must lie in a folder that is there, got {str(folder)!r}")
    needed, free = 4 * num_samples**2, shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"the {num_samples} x {num_samples} matrix needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free "
            f"where {str(path)!r} is to lie"
        )


def attributes(contents: Contents) -> dict[str, Any]:
    """What the matrix is of."""
    return {
        "num_chains": contents.moments.num_chains,
        "num_draws": contents.moments.num_draws,
        "centering": contents.moments.centering,
        "made_by": "lossk",
        "sets": {name: [rows.start, rows.stop] for name, rows in contents.sets.items()},
    }


def _write_all(descriptor: int, content: bytes, at: int) -> None:
    while content:
        done = os.pwrite(descriptor, content, at)
        content, at = content[done:], at + done
