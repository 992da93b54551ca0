"""`lossk.open`: a finished store as the kernel that it holds."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
import zarr
from torch import Tensor

from lossk.blocks import Moments
from lossk.diagnostics import Diagnostics
from lossk.disk import in_one_step
from lossk.errors import StoreError
from lossk.kernel import LossKernel
from lossk.store import FORMAT, open_kernel, read_json
from lossk.stored_factor import StoredFactor


def open_store(path: str | Path) -> LossKernel:
    """Open a `.lossk` store for reading; tiles, and traces written by `TraceWriter`, stay on disk until asked for.

    Raises:
        StoreError: no store there, unfinished (with how far it got), or of a newer format.
    """
    path = Path(path)
    if not (path / "complete").exists() or "factor_chunk" not in read_json(path / "config.json"):
        return open_kernel(path)
    description = read_json(path / "config.json")
    if description.get("format") != FORMAT:
        raise StoreError(f"{str(path)!r} has format {description.get('format')}, this version reads {FORMAT}")
    group = zarr.open_group(path, mode="r")
    moments = Moments(
        **{name: _read(group, name) for name in ("mean", "variance", "scale", "chain_mean", "lag1")},
        num_chains=description["num_chains"],
        num_draws=description["num_draws"],
        centering=description["centering"],
    )
    return LossKernel(
        StoredFactor(_array(group, "factor"), description["freedom"], path),
        moments,
        meta=description["meta"],
        diagnostics=Diagnostics.from_dict(description["diagnostics"]),
        tokens=_read(group, "tokens") if "tokens" in group else None,
        sets={name: slice(*ends) for name, ends in (description.get("sets") or {}).items()},
    )


def copy_store(source: Path, path: Path, overwrite: bool) -> None:
    """Copy a finished store, which is never changed, to another path."""
    with in_one_step(path, overwrite) as parts:
        shutil.copytree(source, parts)


def _read(group: zarr.Group, name: str) -> Tensor:
    try:
        return torch.from_numpy(np.asarray(_array(group, name)[...]))
    except ValueError as error:
        raise StoreError(f"the store's array {name!r} is damaged: {error}") from error


def _array(group: zarr.Group, name: str) -> zarr.Array:
    array = group.get(name)
    if not isinstance(array, zarr.Array):
        raise StoreError(f"the store's array {name!r} is missing")
    return array
