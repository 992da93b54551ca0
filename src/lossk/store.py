"""The `.lossk` store: a Zarr v3 group that any Zarr reader opens, and the log that makes a run resumable.

    config.json    what was asked for, chosen and measured        losses      [chain, draw, sample] float32, nats
    mean, variance, scale, lag1  [sample] float64                 chain_mean  [chain, sample] float64
    tiles          [row, column] float16/32, upper triangle, one chunk per tile: covariance / (scale_i scale_j)
    factor         [draw, sample] float16/32, instead of tiles    complete    written last
    tokens         [sample, 2] int64, (sample of its set, position) of a loss per token only
    commits.jsonl  one line per durable panel                     state-K.npz  a chain after its last one, line K
    tiles.jsonl    one line per durable tile, while tiles are made out of core

Nothing in a store is executable: JSON, Zarr chunks with checksums, and NumPy arrays read with pickling refused.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from torch import Tensor

from lossk.blocks import FactorBlocks, Moments, TileBlocks
from lossk.diagnostics import Diagnostics
from lossk.disk import consolidate, in_one_step, read_json, read_lines, sync_tree, write_json
from lossk.errors import StoreError
from lossk.kernel import LossKernel
from lossk.stored_factor import StoredFactor
from lossk.stored_tiles import CHECKED, StoredTiles, write_tiles
from lossk.witness import differences

FORMAT = 1


def save_kernel(kernel: LossKernel, path: Path, *, overwrite: bool = False) -> None:
    """Write a finished kernel beside its final name and move it there in one step."""
    if path.exists() and not overwrite:
        raise FileExistsError(f"path {str(path)!r} exists; pass overwrite=True to replace it")
    with in_one_step(path, overwrite) as parts:
        if isinstance(kernel._blocks, StoredFactor):  # a finished store is never changed: its copy is as good
            shutil.copytree(kernel._blocks.path, parts)
        else:
            zarr.create_group(parts, zarr_format=3)
            write_kernel(kernel, parts)


def write_kernel(kernel: LossKernel, path: Path, *, with_tiles: bool = True) -> None:
    """Write a kernel's arrays and description into an existing group, `complete` last.

    Args:
        with_tiles: False where its tiles, or its factor, are in that group already.
    """
    group = zarr.open_group(path, mode="r+")
    moments, blocks = kernel._moments, kernel._blocks
    for name in ("mean", "variance", "scale", "lag1"):
        _write_array(group, name, getattr(moments, name), ("sample",))
    _write_array(group, "chain_mean", moments.chain_mean, ("chain", "sample"))
    if kernel.tokens is not None:
        _write_array(group, "tokens", kernel.tokens, ("sample", "index"))
    if isinstance(blocks, FactorBlocks) and with_tiles:
        _write_array(group, "factor", blocks.factor, ("draw", "sample"))
    elif with_tiles:
        assert isinstance(blocks, TileBlocks)
        write_tiles(group, blocks)
    saved = read_json(path / "config.json") if (path / "config.json").exists() else {}
    description = {
        **kernel.meta.get("config", {}),
        **saved,
        "format": FORMAT,
        "kind": blocks.kind,
        "num_samples": blocks.num_samples,
        "tile": saved.get("tile", blocks.tile),
        "num_chains": moments.num_chains,
        "num_draws": moments.num_draws,
        "centering": moments.centering,
        "sets": {name: [rows.start, rows.stop] for name, rows in kernel.sets.items()} or None,
        "freedom": getattr(blocks, "freedom", None),
        **({"factor_chunk": blocks.tile} if isinstance(blocks, StoredFactor) else {}),
        "meta": kernel.meta,
        "diagnostics": None if kernel.diagnostics is None else kernel.diagnostics.to_dict(),
    }
    write_json(path / "config.json", description)
    sync_tree(path)
    _write_array(group, "complete", torch.ones(1, dtype=torch.int8, device="cpu"), ("format",))
    sync_tree(path / "complete")
    consolidate(path)


def _write_array(group: zarr.Group, name: str, values: Tensor, dimensions: tuple[str, ...]) -> None:
    array = group.create_array(
        name,
        shape=tuple(values.shape),
        dtype=str(values.dtype).removeprefix("torch."),
        chunks=(*values.shape[:-1], min(values.shape[-1], 2**20)),
        dimension_names=dimensions,
        compressors=CHECKED,
        overwrite=True,
    )
    array[...] = values.numpy()


def open_kernel(path: str | Path) -> LossKernel:
    """Open a `.lossk` store for reading; tiles, and traces written by `TraceWriter`, stay on disk until asked for.

    Raises:
        StoreError: no store there, unfinished (with how far it got), or of a newer format.
    """
    path = Path(path)
    if not path.exists():
        raise StoreError(f"there is no store at {str(path)!r}")
    try:
        group = zarr.open_group(path, mode="r")
    except (FileNotFoundError, ValueError) as error:
        raise StoreError(f"{str(path)!r} is not a .lossk store: {error}") from error
    if "complete" not in group:
        raise StoreError(f"{str(path)!r} is unfinished: {progress_of(path)}; continue it with resume=True")
    description = read_json(path / "config.json")
    if description.get("format") != FORMAT:
        raise StoreError(f"{str(path)!r} has format {description.get('format')}, this version reads {FORMAT}")
    moments = Moments(
        **{name: _read(group, name) for name in ("mean", "variance", "scale", "chain_mean", "lag1")},
        num_chains=description["num_chains"],
        num_draws=description["num_draws"],
        centering=description["centering"],
    )
    blocks: FactorBlocks | TileBlocks
    if "factor_chunk" in description:
        blocks = StoredFactor(_array(group, "factor"), description["freedom"], path)
    elif description["kind"] == "factor":
        blocks = FactorBlocks(_read(group, "factor"), description["freedom"], description["tile"])
    else:
        tile = description["tile"]
        tiles = StoredTiles(path, min(tile, description["num_samples"]))
        blocks = TileBlocks(description["num_samples"], tile, tiles)
    plain = description["diagnostics"]
    diagnostics = None if plain is None else Diagnostics.from_dict(plain)
    return LossKernel(
        blocks,
        moments,
        meta=description["meta"],
        diagnostics=diagnostics,
        tokens=_read(group, "tokens") if "tokens" in group else None,
        sets={name: slice(*ends) for name, ends in (description.get("sets") or {}).items()},
    )


def open_finished(path: Path, request: Mapping[str, Any]) -> LossKernel | None:
    """The kernel at `path` if that run is complete; None if it is not.

    Raises:
        StoreError: complete, but of another request.
    """
    if not (path / "complete").exists():
        return None
    refuse_other_run(path, read_json(path / "config.json"), request)
    return open_kernel(path)


def saved_panel(path: Path | None) -> int | None:
    """The panel of the run at `path`: a choice that a resumed run keeps. None where there is no such run."""
    if path is None or not (path / "config.json").exists():
        return None
    panel = read_json(path / "config.json").get("panel")
    return panel if isinstance(panel, int) else None


def refuse_other_run(path: Path, saved: Mapping[str, Any], request: Mapping[str, Any]) -> None:
    """Raise StoreError, showing the difference, unless a saved request is this one."""
    changed = differences(saved, request)
    if changed:
        raise StoreError(f"out={str(path)!r} holds another run, not resumed ({'; '.join(changed)})")


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


def progress_of(path: Path) -> str:
    """How far an unfinished store got, in words."""
    commits = read_commits(path)
    request = read_json(path / "config.json") if (path / "config.json").exists() else {}
    if not commits or "num_chains" not in request:
        return "no draws are saved yet"
    done = sum(len(c["excess"]) for c in commits)
    tiles = sum(len(read_lines(file)) for file in path.glob("tiles*.jsonl"))
    return f"{done} of {request['num_chains'] * request['num_draws']} draws are saved" + (
        f", and {tiles} tiles" if tiles else ""
    )


def read_commits(path: Path) -> list[dict[str, Any]]:
    """The committed panels, in order; of those that were committed together, all or none."""
    commits = read_lines(path / "commits.jsonl")
    if commits and commits[-1].get("part", 0) + 1 < commits[-1].get("parts", 1):
        del commits[-1 - commits[-1]["part"] :]
    return commits
