"""`lossk verify`: is a store whole, and can what it holds be a kernel?

Every chunk of every array is read once: its checksum, and that its numbers are finite. On the way: that the moments fit
each other; that diagonal tiles are symmetric and their diagonal is the variance; that no entry exceeds what its two
variances allow; that random principal blocks have no negative eigenvalue beyond rounding; and that one of them is the
covariance of the stored losses (`lossk.verify_numbers` has the bounds).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from lossk.disk import read_json
from lossk.errors import StoreError
from lossk.store import FORMAT, progress_of, read_commits
from lossk.verify_numbers import FactorCheck, LossCheck, TileCheck, check_moments, choose_blocks

MOMENTS = ("variance", "mean", "scale", "lag1", "chain_mean")
Region = tuple[slice, ...]


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
    if not (path / "zarr.json").exists():
        raise StoreError(f"there is no store at {str(path)!r}")
    found = Verification()
    arrays = _open_arrays(path, found)
    config = _read_config(path, found)
    if "complete" not in arrays:
        found.problems.append(f"unfinished: {progress_of(path)}; continue it with resume=True")
        _check_unfinished(path, arrays, found)
        return found
    moments = _read_moments(path, arrays, config, found)
    if config is None or moments is None:
        for name in sorted(set(arrays) - set(MOMENTS)):  # which chunks may be zero, only the moments tell
            _walk(path, name, arrays[name], found, lambda region: False)
        return found
    _check_kernel(path, arrays, config, moments, found, num_blocks=num_blocks, side=side, seed=seed)
    return found


def _open_arrays(path: Path, found: Verification) -> dict[str, zarr.Array]:
    """All arrays, by the folders that there are: the group's own list may be older than they."""
    try:
        zarr.open_group(path, mode="r")
    except (ValueError, KeyError, TypeError, OSError) as error:
        found.problems.append(f"zarr.json: the group's description cannot be read: {error}")
    arrays = {}
    for folder in sorted(file.parent for file in path.glob("*/zarr.json")):
        try:
            arrays[folder.name] = zarr.open_array(folder, mode="r")
        except (ValueError, KeyError, TypeError, OSError) as error:
            found.problems.append(f"{folder.name}: its description, zarr.json, cannot be read: {error}")
    return arrays


def _read_config(path: Path, found: Verification) -> dict[str, Any] | None:
    try:
        config = read_json(path / "config.json")
    except StoreError as error:
        found.problems.append(str(error))
        return None
    if (path / "complete").exists() and config.get("format") != FORMAT:
        found.problems.append(f"config.json: format {config.get('format')}, this version reads {FORMAT}")
        return None
    return config


def _read_moments(
    path: Path, arrays: dict[str, zarr.Array], config: dict[str, Any] | None, found: Verification
) -> dict[str, np.ndarray] | None:
    """Each moment [N] (chain_mean [C, N]) if all of them could be read."""
    before, moments = len(found.problems), {}
    for name in MOMENTS:
        if name not in arrays:
            found.problems.append(f"{name}: the array is missing")
            continue
        moments[name] = np.zeros(arrays[name].shape)
        for _, region, values in _chunks(path, name, arrays[name], found, _moment_is_lost(name, moments, config)):
            moments[name][region] = values
    if len(found.problems) == before and config is not None:
        found.problems += check_moments(moments, config)
    if len(found.problems) > before or config is None:
        return None
    found.checks.append(f"{', '.join(MOMENTS)}: finite, and fit each other")
    return moments


def _moment_is_lost(
    name: str, moments: dict[str, np.ndarray], config: dict[str, Any] | None
) -> Callable[[Region], bool]:
    """Zarr leaves out a chunk of zeros: that of samples that never vary. (A lost variance shows in the diagonal.)"""
    alive = moments["variance"] > 0
    within = (
        name != "lag1" or (config or {}).get("centering") == "chain"
    )  # pooled, a sample may vary between chains only
    return lambda region: name == "scale" or (name != "variance" and within and bool(alive[region[-1]].any()))


def _check_kernel(
    path: Path,
    arrays: dict[str, zarr.Array],
    config: dict[str, Any],
    moments: dict[str, np.ndarray],
    found: Verification,
    *,
    num_blocks: int,
    side: int,
    seed: int,
) -> None:
    kind = "factor" if config["kind"] == "factor" else "tiles"
    if kind not in arrays:
        found.problems.append(f"{kind}: the array is missing")
        return
    dead = moments["variance"] == 0
    blocks = choose_blocks(~dead, num_blocks, side, seed)
    check = (FactorCheck if kind == "factor" else TileCheck)(moments, config, str(arrays[kind].dtype), blocks)

    def is_lost(region: Region) -> bool:
        """Of a saved factor Zarr leaves out a chunk of zeros, which only samples that never vary have."""
        return kind == "tiles" or "factor_chunk" in config or not any(dead[side].all() for side in region[1:])

    for coordinates, region, values in _chunks(path, kind, arrays[kind], found, is_lost):
        found.problems += check.add(coordinates, region, values)
    _say_checked(kind, arrays[kind], found)
    said, wrong = check.finish()
    found.checks += said
    found.problems += wrong
    if "losses" in arrays:
        losses = LossCheck(moments, config, check)
        zero = not (moments["mean"].any() or moments["variance"].any())
        for _, region, values in _chunks(path, "losses", arrays["losses"], found, lambda region: not zero):
            losses.add(region, values)
        _say_checked("losses", arrays["losses"], found)
        said, wrong = losses.finish()
        found.checks += said
        found.problems += wrong
    for name in sorted(set(arrays) - {*MOMENTS, kind, "losses"}):
        _walk(path, name, arrays[name], found, lambda region: name != "tokens" or len(dead) > 1)  # noqa: B023


def _check_unfinished(path: Path, arrays: dict[str, zarr.Array], found: Verification) -> None:
    """Whatever chunks there are; those of committed panels must be."""
    for name in sorted(set(arrays) - {"losses"}):
        _walk(path, name, arrays[name], found, lambda region: False)
    if "losses" not in arrays:
        return
    panels = {(commit["chain"], commit["first_draw"]) for commit in read_commits(path)}
    committed = lambda region: (region[0].start, region[1].start) in panels  # noqa: E731
    _walk(path, "losses", arrays["losses"], found, committed)


def _walk(
    path: Path,
    name: str,
    array: zarr.Array,
    found: Verification,
    is_lost: Callable[[Region], bool] = lambda region: True,
) -> None:
    for _ in _chunks(path, name, array, found, is_lost):
        pass
    _say_checked(name, array, found)


def _say_checked(name: str, array: zarr.Array, found: Verification) -> None:
    if not any(problem.startswith(f"{name}: chunk") for problem in found.problems):
        found.checks.append(f"{name}: {array.dtype} {list(array.shape)}, every chunk's checksum, finite numbers")


def _chunks(
    path: Path,
    name: str,
    array: zarr.Array,
    found: Verification,
    is_lost: Callable[[Region], bool],
) -> Iterator[tuple[tuple[int, ...], Region, np.ndarray]]:
    """(coordinates, region, values) of every intact chunk; the others become problems.

    Of `tiles`, the upper triangle. A chunk without a file reads as zeros; `is_lost(region)` says whether it should not.
    """
    stored = array.shards or array.chunks
    counts = [range(-(-size // step)) for size, step in zip(array.shape, stored, strict=True)]
    for coordinates in itertools.product(*counts):
        if name == "tiles" and coordinates[0] > coordinates[1]:
            continue
        region = tuple(
            slice(c * step, min((c + 1) * step, size))
            for c, step, size in zip(coordinates, stored, array.shape, strict=True)
        )
        where = f"{name}: chunk {', '.join(map(str, coordinates))}"
        if not (path / name / array.metadata.encode_chunk_key(coordinates)).is_file() and is_lost(region):
            found.problems.append(f"{where} is missing")
            continue
        try:
            values = np.asarray(array[region])
        except Exception as error:  # a damaged chunk can fail in any way in a codec
            found.problems.append(f"{where} is damaged: {' '.join(str(error).split()) or type(error).__name__}")
            continue
        finite = np.isfinite(values)
        if not finite.all():
            place = [int(p) + r.start for p, r in zip(np.argwhere(~finite)[0], region, strict=True)]
            found.problems.append(f"{where} holds {int((~finite).sum())} non-finite numbers, the first at {place}")
            continue
        yield coordinates, region, values
