"""The `.lossk` store: a Zarr v3 group that any Zarr reader opens, and the log that makes a run resumable.

    config.json    what was asked for, chosen and measured        losses      [chain, draw, sample] float32, nats
    mean, variance, scale, lag1  [sample] float64                 chain_mean  [chain, sample] float64
    tiles          [row, column] float16/32, upper triangle, one chunk per tile: covariance / (scale_i scale_j)
    factor         [draw, sample] float16/32, instead of tiles    checksums.json  of every file
    watched        [watched] int64, up to 256 samples beside tiles; watched_losses [chain, draw, watched] float32, nats
    tokens         [sample, 2] int64, (sample of its set, position) of a loss per token only
    ids, labels    [sample] int64 (texts: [sample, byte] int8, UTF-8), where the user gave them
    complete       moved into place last, once all of this is durable
    commits.jsonl  one line per durable panel                     state-K.npz  a chain after its last one, line K
    tiles.jsonl    one line per durable tile, while tiles are made out of core

Nothing in a store is executable: JSON, Zarr chunks with checksums, and NumPy arrays read with pickling refused.
Whatever is missing, or is not what was written, is a `StoreError` that names it: on opening, or, of tiles, the factor
and the losses, which are read when asked for, then.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lossk.checks import check_place
from lossk.disk.chunks import ArraySpec, Digests
from lossk.disk.files import Digest, sync_tree
from lossk.disk.locks import Lock
from lossk.disk.sealed import MARK, read_sealed, write_sealed
from lossk.disk.swap import in_one_step, recover
from lossk.errors import StoreError
from lossk.forms.blocks import FactorBlocks, Moments, TileBlocks
from lossk.forms.watched import Watched, wrong_index
from lossk.store.commits import COMMITS, clear_transient, is_transient, progress_of
from lossk.store.contents import Contents
from lossk.store.description import CHUNK_SAMPLES, FORMAT, read_diagnostics
from lossk.store.manifest import MANIFEST, MOMENTS, WATCHED_ARRAYS, finish_store, is_complete, write_array
from lossk.store.names import named_arrays, read_stored_names
from lossk.store.opened import OpenStore, copy_store, identity
from lossk.store.stored_factor import StoredFactor
from lossk.store.stored_tiles import StoredTiles, write_tiles
from lossk.store.witness import differences

TRIES = 5  # to open a store that others replace meanwhile


def save_contents(contents: Contents, path: Path, *, overwrite: bool = False) -> None:
    """Write a finished kernel's parts beside its final name and move it there in one step."""
    if os.path.lexists(path) and not overwrite:
        raise FileExistsError(f"path {str(path)!r} exists; pass overwrite=True to replace it")
    with in_one_step(path, overwrite) as parts:
        if isinstance(contents.blocks, StoredFactor):  # a finished store is never changed: its copy is as good
            copy_store(contents.blocks.source(), parts)
        else:
            write_contents(contents, parts)


def write_contents(contents: Contents, path: Path, *, with_tiles: bool = True, known: Digests | None = None) -> None:
    """Write a kernel's arrays and description into a folder, durably, `complete` last.

    Args:
        with_tiles: False where its tiles, or its factor, are there already.
        known: the digests of files that are there already.
    """
    moments, blocks = contents.moments, contents.blocks
    files: dict[str, Digest] = {}
    for name in MOMENTS:
        dimensions = ("chain", "sample") if name == "chain_mean" else ("sample",)
        files |= write_tensor(path, name, getattr(moments, name), dimensions)
    if contents.tokens is not None:
        files |= write_tensor(path, "tokens", contents.tokens, ("sample", "index"))
    for name, (values, named) in named_arrays(contents.names).items():
        files |= write_tensor(path, name, torch.from_numpy(values), named)
    if blocks.kind == "tiles" and (watched := contents.watched) is not None:
        files |= write_tensor(path, "watched", watched.index, ("watched",))
        files |= write_tensor(path, "watched_losses", watched.losses, ("chain", "draw", "watched"))
    if isinstance(blocks, FactorBlocks) and with_tiles:
        files |= write_tensor(path, "factor", blocks.factor, ("draw", "sample"))
    elif with_tiles:
        assert isinstance(blocks, TileBlocks)
        files |= write_tiles(path, blocks)
        sync_tree(path / "tiles")
    saved = read_sealed(path / "config.json") if (path / "config.json").exists() else {}
    description = {
        **contents.meta.get("config", {}),
        **saved,
        "num_samples": blocks.num_samples,
        "tile": saved.get("tile", blocks.tile),
        "num_chains": moments.num_chains,
        "num_draws": moments.num_draws,
        "centering": moments.centering,
        "freedom": getattr(blocks, "freedom", None),
        **({"factor_chunk": blocks.tile} if isinstance(blocks, StoredFactor) else {}),
    }
    write_description(path, contents, description)
    finish_store(path, {**(known or {}), **files})


def write_description(path: Path, contents: Contents, description: Mapping[str, Any]) -> None:
    """Write what a finished kernel is: `description`, and what is kept beside its numbers."""
    sets = {name: [rows.start, rows.stop] for name, rows in contents.sets.items()} or None
    content = {
        **description,
        "format": FORMAT,
        MARK: "crc32c",
        "kind": contents.blocks.kind,
        "dtype": contents.dtype,
        "sets": sets,
        **({"class_names": list(contents.names.class_names)} if contents.names.class_names else {}),
        "meta": contents.meta,
        "diagnostics": None if contents.diagnostics is None else contents.diagnostics.to_dict(),
    }
    write_sealed(path / "config.json", content)


def write_tensor(path: Path, name: str, values: Tensor, dimensions: tuple[str, ...]) -> dict[str, Digest]:
    """A new array of a store, durable but for its own name; the digests of its files."""
    dtype, shape = str(values.dtype).removeprefix("torch."), tuple(values.shape)
    width = CHUNK_SAMPLES
    chunks = (width, *shape[1:]) if dimensions[0] == "sample" else (*shape[:-1], width)
    found = write_array(path, name, values.numpy(), ArraySpec.of(shape, dtype, dimensions, chunks))
    sync_tree(path / name)
    return found


# --- reading -------------------------------------------------------------------------------------------------------


def read_contents(path: str | Path) -> Contents:
    """What a finished store holds; tiles, and traces written by `TraceWriter`, stay on disk until asked for.

    Raises:
        StoreError: no store there, unfinished (with how far it got), damaged, or of a newer format.
    """
    path = check_place("path", path)
    recover(path)
    for _ in range(TRIES - 1):
        before = _identity(path)
        try:
            return _open(path)
        except StoreError:
            if _identity(path) == before:  # nobody has moved another store there meanwhile
                raise
    return _open(path)


def _identity(path: Path) -> Any:
    try:
        return identity(path)
    except StoreError:
        return None


def _open(path: Path) -> Contents:
    refuse_unfinished(path)
    store = OpenStore(path)
    config = store.config
    moments = Moments(
        **{name: torch.from_numpy(values) for name, values in store.read_moments().items()},
        num_chains=config["num_chains"],
        num_draws=config["num_draws"],
        centering=config["centering"],
    )
    blocks: FactorBlocks | TileBlocks
    if config["kind"] == "tiles":
        blocks = TileBlocks(config["num_samples"], config["tile"], StoredTiles.of(store))
    elif "factor_chunk" in config:
        blocks = StoredFactor(store.factor(moments.variance.numpy()), config["freedom"], path, store)
    else:
        array = store.factor(moments.variance.numpy())
        blocks = FactorBlocks(torch.from_numpy(store.all_of(array)), config["freedom"], config["tile"])
    return Contents(
        blocks=blocks,
        moments=moments,
        meta=config["meta"],
        diagnostics=read_diagnostics(path, config),
        tokens=torch.from_numpy(store.read("tokens")) if "tokens" in store.specs else None,
        sets={name: slice(*ends) for name, ends in (config.get("sets") or {}).items()},
        watched=_read_watched(store),
        names=read_stored_names(store),
    )


def _read_watched(store: OpenStore) -> Watched | None:
    """The traces kept beside tiles; None in a store of an earlier version.

    Raises:
        StoreError: they are damaged, or cannot be of this kernel.
    """
    if not any(name in store.specs for name in WATCHED_ARRAYS):
        return None
    index, losses = (torch.from_numpy(store.read(name)) for name in WATCHED_ARRAYS)
    if wrong := wrong_index(index.numpy(), store.config["num_samples"]):
        raise StoreError(f"the store's array 'watched' in {str(store.path)!r} is damaged: {wrong}")
    return Watched(index, losses)


def refuse_unfinished(path: Path) -> None:
    """Raise StoreError unless a finished store is there."""
    if not path.exists():
        raise StoreError(f"path: there is no store at {str(path)!r}")
    if not (path / "zarr.json").is_file():
        raise StoreError(f"path: {str(path)!r} is not a .lossk store: it has no zarr.json")
    if is_complete(path):
        return
    if (path / MANIFEST).exists() and not (path / COMMITS).exists():
        raise StoreError(f"the store's array 'complete' in {str(path)!r} is missing")
    raise StoreError(f"{str(path)!r} is unfinished: {progress_of(path)}; continue it with resume=True")


def open_finished(path: Path, request: Mapping[str, Any]) -> Contents | None:
    """What `path` holds if that run is complete; None if it is not. What its end left behind is cleared away.

    Raises:
        StoreError: complete, but of another request.
    """
    if not is_complete(path):
        return None
    refuse_other_run(path, read_sealed(path / "config.json"), request)
    contents = read_contents(path)
    if any(is_transient(entry.name) for entry in path.iterdir()):
        with suppress(StoreError):  # another process is at it, or nobody may
            lock = Lock(path)
            try:
                clear_transient(path)
            finally:
                lock.release()
    return contents


def saved_panel(path: Path | None) -> int | None:
    """The panel of the run at `path`: a choice that a resumed run keeps. None where there is no such run."""
    if path is None or not (path / "config.json").exists():
        return None
    panel = read_sealed(path / "config.json").get("panel")
    return panel if isinstance(panel, int) else None


def refuse_other_run(path: Path, saved: Mapping[str, Any], request: Mapping[str, Any]) -> None:
    """Raise StoreError, showing the difference, unless a saved request is this one."""
    changed = differences(saved, request)
    if changed:
        raise StoreError(f"out={str(path)!r} holds another run, not resumed ({'; '.join(changed)})")
