"""`lossk verify`: is a store whole, and can what it holds be a kernel?

Every chunk of every array is read once: its checksum, and that its numbers are finite. On the way: that the moments fit
each other; that diagonal tiles are symmetric and their diagonal is the variance; that no entry exceeds what its two
variances allow; that random principal blocks have no negative eigenvalue beyond rounding; and that one of them is the
covariance of the stored losses (`lossk.store.verify_numbers` has the bounds).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lossk.disk.chunks import At, ChunkError, Chunks, Region
from lossk.disk.files import read_json
from lossk.disk.sealed import MARK, read_sealed
from lossk.errors import StoreError
from lossk.store.commits import Commit, progress_of, read_commits
from lossk.store.description import check_description, check_group, check_spec
from lossk.store.earlier import ZeroChunks, dead_chunks, find_zeros
from lossk.store.manifest import (
    COMPLETE,
    DESCRIPTIONS,
    MANIFEST,
    MOMENTS,
    WATCHED_ARRAYS,
    digest_of,
    is_complete,
    read_manifest,
    written,
)
from lossk.store.verify_numbers import FactorCheck, LossCheck, TileCheck, check_moments, check_watched, choose_blocks

Digests = dict[str, tuple[int, int]]


@dataclass
class Verification:
    """What was found: `checks` that passed, one line each, and `problems`, each with what is wrong and where."""

    checks: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems


def verify_store(path: str | Path, *, num_blocks: int = 8, side: int = 128, seed: int = 0) -> Verification:
    """Check all of a store. Takes the memory of a few chunks and reads every byte once.

    Args:
        num_blocks, side: random principal blocks, and samples in each.
        seed: of their choice.

    Raises:
        StoreError: there is no store at `path`.
    """
    path = Path(path)
    if not any((path / name).is_file() for name in ("zarr.json", "config.json", MANIFEST)):
        raise StoreError(f"there is no store at {str(path)!r}")
    found = Verification()
    config = _read_config(path, found)
    complete = is_complete(path)
    known = _read_digests(path, config, found) if complete else None
    arrays = _open_arrays(path, known, config if complete else None, found)
    _check_group(path, arrays, found)
    if not complete:
        _say_unfinished(path, found)
        _check_unfinished(path, arrays, config or {}, found)
        return found
    moments = _read_moments(arrays, config, found)
    if config is None or moments is None:
        for name in sorted(set(arrays) - set(MOMENTS)):
            _walk(arrays[name], found)
        return found
    _check_kernel(arrays, config, moments, found, num_blocks=num_blocks, side=side, seed=seed)
    return found


def _read_config(path: Path, found: Verification) -> dict[str, Any] | None:
    try:
        config = read_sealed(path / "config.json")
        if is_complete(path):
            check_description(path, config)
    except StoreError as error:
        found.problems.append(_from(error, "config.json"))
        return None
    return config


def _from(error: StoreError, name: str) -> str:
    """What is wrong, with the name of the file, or the array, in front."""
    return str(error) if str(error).startswith(name) else f"{name}: {error}"


def _read_digests(path: Path, config: dict[str, Any] | None, found: Verification) -> Digests | None:
    """Those of all files; the descriptions are checked against them."""
    try:
        known = read_manifest(path)
    except StoreError as error:
        found.problems.append(_from(error, MANIFEST))
        return None
    if known is None:
        if config is None or MARK in config:
            found.problems.append(f"{MANIFEST}: is missing")
        else:
            found.checks.append("checksums: every chunk has one; an earlier version wrote none of the descriptions")
        return None
    before = len(found.problems)
    for name in DESCRIPTIONS:
        if name in known or (path / name).exists():
            try:
                same = digest_of(path / name) == known.get(name)
            except StoreError:
                found.problems.append(f"{name}: is missing")
                continue
            if not same and not any(problem.startswith(name) for problem in found.problems):
                found.problems.append(f"{name}: is not what was written: it does not fit its checksum in {MANIFEST}")
    if len(found.problems) == before:
        found.checks.append(f"{', '.join(DESCRIPTIONS[:2])}: as they were written, by {MANIFEST}")
    return known


def _open_arrays(
    path: Path, known: Digests | None, config: dict[str, Any] | None, found: Verification
) -> dict[str, Chunks]:
    """All arrays: by the folders that there are, and by what was written."""
    names = {file.parent.name for file in path.glob("*/zarr.json")}
    names |= {name.removesuffix("/zarr.json") for name in known or () if name.endswith("/zarr.json")}
    arrays: dict[str, Chunks] = {}
    for name in sorted(names):
        if not (path / name).is_dir():
            found.problems.append(f"{name}: the array is missing")
            continue
        try:
            kind = Chunks if known is not None else ZeroChunks
            array = kind.open(path, name, known, whole=known is not None)
            if config is not None and name != COMPLETE:
                check_spec(path, config, name, array.spec)
        except StoreError as error:
            found.problems.append(f"{name}: its description, zarr.json, cannot be trusted: {error}")
            continue
        arrays[name] = array
    return arrays


def _check_group(path: Path, arrays: dict[str, Chunks], found: Verification) -> None:
    try:
        check_group(path, read_json(path / "zarr.json"), {name: array.spec for name, array in arrays.items()})
    except StoreError as error:
        if not any(problem.startswith("zarr.json") for problem in found.problems):
            found.problems.append(_from(error, "zarr.json"))


def _read_moments(
    arrays: dict[str, Chunks], config: dict[str, Any] | None, found: Verification
) -> dict[str, np.ndarray] | None:
    """Each moment [N] (chain_mean [C, N]) if all of them could be read."""
    before = len(found.problems)
    found.problems += [
        f"{name}: the array is missing"
        for name in MOMENTS
        if name not in arrays and not any(problem.startswith(f"{name}: ") for problem in found.problems)
    ]
    there = {name: arrays[name] for name in MOMENTS if name in arrays}
    if len(there) < len(MOMENTS):
        for array in there.values():
            _walk(array, found)
        return None
    earlier = {name: array for name, array in there.items() if isinstance(array, ZeroChunks)}
    if earlier:
        with suppress(ChunkError):  # it is named below
            find_zeros(earlier)
    moments = {}
    for name, array in there.items():
        moments[name] = np.zeros(array.shape)
        for _, region, values in _chunks(array, found):
            moments[name][region] = values
    if len(found.problems) == before and config is not None:
        found.problems += check_moments(moments, config)
    if len(found.problems) > before or config is None:
        return None
    found.checks.append(f"{', '.join(MOMENTS)}: finite, and fit each other")
    return moments


def _check_kernel(
    arrays: dict[str, Chunks],
    config: dict[str, Any],
    moments: dict[str, np.ndarray],
    found: Verification,
    *,
    num_blocks: int,
    side: int,
    seed: int,
) -> None:
    kind = "factor" if config["kind"] == "factor" else "tiles"
    for name in sorted(set(arrays) - {*MOMENTS, *WATCHED_ARRAYS, kind, "losses"}):
        other = arrays[name]
        if name == "tokens" and isinstance(other, ZeroChunks) and config["num_samples"] == 1:
            other.zeros = frozenset({(0, 0)})
        _walk(other, found)
    if kind not in arrays:
        if not any(problem.startswith(f"{kind}: ") for problem in found.problems):
            found.problems.append(f"{kind}: the array is missing")
        _check_watched(arrays, config, moments, found)
        return
    dead = moments["variance"] == 0
    blocks = choose_blocks(~dead, num_blocks, side, seed)
    array = arrays[kind]
    if kind == "factor" and isinstance(array, ZeroChunks) and "factor_chunk" not in config:
        array.zeros = dead_chunks(array, dead)
    check = (FactorCheck if kind == "factor" else TileCheck)(moments, config, array.spec.dtype, blocks)
    for coordinates, region, values in _chunks(array, found):
        found.problems += check.add(coordinates, region, values)
    _say_checked(array, found)
    said, wrong = check.finish()
    found.checks += said
    found.problems += wrong
    if "losses" in arrays:
        losses = LossCheck(moments, config, check)
        for _, region, values in _chunks(arrays["losses"], found):
            losses.add(region, values)
        _say_checked(arrays["losses"], found)
        said, wrong = losses.finish()
        found.checks += said
        found.problems += wrong
    _check_watched(arrays, config, moments, found)


def _check_watched(
    arrays: dict[str, Chunks], config: dict[str, Any], moments: dict[str, np.ndarray], found: Verification
) -> None:
    """The traces beside tiles: whole, and of the samples that they say."""
    there = [name for name in WATCHED_ARRAYS if name in arrays]
    before, read = len(found.problems), {}
    if len(there) == 1:
        (lacking,) = set(WATCHED_ARRAYS) - set(there)
        if not any(problem.startswith(f"{lacking}: ") for problem in found.problems):
            found.problems.append(f"{lacking}: the array is missing")
    for name in there:
        for _, _, values in _chunks(arrays[name], found):
            read[name] = values
        _say_checked(arrays[name], found)
    if len(read) == 2 and len(found.problems) == before:
        said, wrong = check_watched(read["watched"], read["watched_losses"], moments, config)
        found.checks += said
        found.problems += wrong


def _say_unfinished(path: Path, found: Verification) -> None:
    try:
        found.problems.append(f"unfinished: {progress_of(path)}; continue it with resume=True")
    except StoreError as error:
        found.problems.append(f"unfinished: how far it got is not known: {error}")


def _check_unfinished(path: Path, arrays: dict[str, Chunks], config: dict[str, Any], found: Verification) -> None:
    """Whatever chunks there are; those of committed panels must be, and be what was written."""
    for name in sorted(set(arrays) - {"losses", COMPLETE}):
        _walk(arrays[name], found, required=False)
    try:
        commits, wrong = read_commits(path, config)
    except StoreError as error:
        commits, wrong = [], None
        if not any(str(error) in problem for problem in found.problems):
            found.problems.append(str(error))
    if wrong is not None:
        found.problems.append(f"{wrong}: what it says is done again")
    if "losses" not in arrays:
        if commits:
            found.problems.append("losses: the array is missing")
        return
    _check_log(path, arrays["losses"], commits, found)


def _check_log(path: Path, losses: Chunks, commits: list[Commit], found: Verification) -> None:
    """Every committed panel's losses, and the states that a resume goes on from."""
    panel = losses.chunks[1]
    sums = {(commit.chain, commit.first_draw // panel): commit.chunks or () for commit in commits}
    known = {
        losses.key((*row, column)): (losses.spec.chunk_bytes, crc)
        for row, chunks in sums.items()
        for column, crc in enumerate(chunks)
    }
    log, before = Chunks(path, "losses", losses.spec, known), len(found.problems)
    for at in log.spec.grid():
        if at[:2] in sums:
            _read(log, at, found)
    if commits and len(found.problems) == before:
        found.checks.append("losses: every committed chunk's checksum, finite numbers")
    last = {commit.chain: (number, commit.state) for number, commit in enumerate(commits)}
    for number, state in last.values():
        if state is not None:
            name = f"state-{number}.npz"
            try:
                if digest_of(path / name) != tuple(state):
                    found.problems.append(f"{name}: is damaged: it does not fit its checksum in commits.jsonl")
            except StoreError:
                found.problems.append(f"{name}: is missing")


def _walk(array: Chunks, found: Verification, *, required: bool = True) -> None:
    for _ in _chunks(array, found, required=required):
        pass
    _say_checked(array, found)


def _say_checked(array: Chunks, found: Verification) -> None:
    if not any(problem.startswith(f"{array.name}: chunk") for problem in found.problems):
        shape = list(array.shape)
        found.checks.append(f"{array.name}: {array.spec.dtype} {shape}, every chunk's checksum, finite numbers")


def _chunks(array: Chunks, found: Verification, *, required: bool = True) -> Iterator[tuple[At, Region, np.ndarray]]:
    """(coordinates, region, values) of every intact chunk; the others become problems.

    Args:
        required: False where a chunk that is not there has not been written yet.
    """
    for at in written(array):
        if required or array.is_there(at):
            values = _read(array, at, found)
            if values is not None:
                yield at, array.spec.region(at), values


def _read(array: Chunks, at: At, found: Verification) -> np.ndarray | None:
    """A chunk, if it is whole and finite."""
    where = f"{array.name}: chunk {', '.join(map(str, at))}"
    try:
        values = array.read(at)
    except ChunkError as error:
        found.problems.append(f"{where} is missing" if error.missing else f"{where} is damaged: {error.reason}")
        return None
    except StoreError as error:
        found.problems.append(f"{where} cannot be read: {error}")
        return None
    finite = np.isfinite(values)
    if finite.all():
        return values
    region = array.spec.region(at)
    place = [int(p) + r.start for p, r in zip(np.argwhere(~finite)[0], region, strict=True)]
    found.problems.append(f"{where} holds {int((~finite).sum())} non-finite numbers, the first at {place}")
    return None
