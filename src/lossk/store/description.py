"""What `config.json` must say of a finished kernel, and what arrays follow from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lossk.diagnostics.diagnostics import Diagnostics
from lossk.disk.chunks import ArraySpec, parse_spec
from lossk.disk.sealed import MARK
from lossk.errors import StoreError
from lossk.forms.centering import degrees_of_freedom
from lossk.forms.names import MOST_BYTES
from lossk.forms.watched import watched_count
from lossk.settings import CENTERINGS
from lossk.store.manifest import MOMENTS, NAMES_ARRAYS, WATCHED_ARRAYS

FORMAT = 1
MOST = 2**48  # of anything that is counted: products of two still fit into what Zarr counts in
CHUNK_SAMPLES = 2**20  # of an array of samples

Config = Mapping[str, Any]


def check_description(path: Path, config: Config) -> None:
    """Raise StoreError, naming the member, unless a finished store's description can be one."""
    if config.get("format") != FORMAT:
        raise StoreError(f"{str(path)!r} has format {config.get('format')!r}, this version reads {FORMAT}")
    for name, (rule, holds) in RULES.items():
        if not holds(config.get(name)):
            raise StoreError(f"config.json of {str(path)!r}: {name} must be {rule}, got {_short(config.get(name))}")
    for name, ends in (config.get("sets") or {}).items():
        if not _is_span(ends, config["num_samples"]):
            raise StoreError(
                f"config.json of {str(path)!r}: set {name!r} must be rows of the kernel, got {_short(ends)}"
            )
    freedom = degrees_of_freedom(config["num_chains"], config["num_draws"], config["centering"])
    if config["kind"] == "factor" and config.get("freedom") != freedom:
        raise StoreError(
            f"config.json of {str(path)!r}: freedom must be {freedom}, got {_short(config.get('freedom'))}"
        )
    read_diagnostics(path, config)


def read_diagnostics(path: Path, config: Config) -> Diagnostics | None:
    """What a description says of how far its kernel can be trusted.

    Raises:
        StoreError: it cannot be read.
    """
    plain = config["diagnostics"]
    try:
        if plain is None or all(_is_plain(value) for value in plain.values()):
            return None if plain is None else Diagnostics.from_dict(plain)
        wrong: Exception = ValueError("its members must be numbers, texts, or lists of these")
    except (TypeError, ValueError) as error:
        wrong = error
    raise StoreError(f"config.json of {str(path)!r}: diagnostics cannot be read: {wrong}") from wrong


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(_is_plain(part) and not isinstance(part, list) for part in value)
    return value is None or isinstance(value, str | int | float)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _count(least: int) -> tuple[str, Callable[[Any], bool]]:
    return f"an integer of at least {least}", lambda value: type(value) is int and least <= value < MOST


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(part, str) for part in value)


def _is_span(ends: Any, num_samples: int) -> bool:
    return (
        isinstance(ends, list)
        and len(ends) == 2
        and all(type(end) is int for end in ends)
        and 0 <= ends[0] < ends[1] <= num_samples
    )


RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "num_samples": _count(1),
    "num_chains": _count(1),
    "num_draws": _count(2),
    "tile": _count(1),
    "kind": ("'tiles' or 'factor'", lambda value: value in ("tiles", "factor")),
    "centering": (f"one of {', '.join(CENTERINGS)}", lambda value: value in CENTERINGS),
    "factor_chunk": ("a count", lambda value: value is None or _count(1)[1](value)),
    "panel": ("a count", lambda value: value is None or _count(1)[1](value)),
    "sets": ("names of rows", lambda value: value is None or isinstance(value, dict)),
    "class_names": ("names", lambda value: value is None or _are_texts(value)),
    "meta": ("an object", lambda value: isinstance(value, dict)),
    "diagnostics": ("an object", lambda value: value is None or isinstance(value, dict)),
}


def check_spec(path: Path, config: Config, name: str, spec: ArraySpec) -> None:
    """Raise StoreError unless an array is of the shape, numbers and chunks that its store's description implies."""
    said = {"shape": spec.shape, "dtype": spec.dtype, "chunks": spec.chunks, "dimensions": spec.dimensions}
    expected = _implied(config, name)
    for key, allowed in expected.items():
        if said[key] not in allowed:
            raise StoreError(
                f"the store's array {name!r} in {str(path)!r} is damaged: its zarr.json says {key} {said[key]!r}, "
                f"config.json implies {' or '.join(map(repr, allowed))}"
            )
    if spec.compressed and name != "tiles":
        raise StoreError(f"the store's array {name!r} in {str(path)!r} is damaged: its zarr.json says compressed")


def _implied(config: Config, name: str) -> dict[str, list[Any]]:
    n, chains, draws = (config[key] for key in ("num_samples", "num_chains", "num_draws"))
    width = min(n, CHUNK_SAMPLES)
    if name in MOMENTS:
        first, names = ((chains,), ("chain",)) if name == "chain_mean" else ((), ())
        chunks, dimensions = [(*first, width)], [(*names, "sample")]
        return {"shape": [(*first, n)], "dtype": ["float64"], "chunks": chunks, "dimensions": dimensions}
    if name == "tokens":
        return {"shape": [(n, 2)], "dtype": ["int64"], "chunks": [(n, 2), (width, 2)]}
    if name in NAMES_ARRAYS:
        widths = range(1, MOST_BYTES + 1) if name == "ids" else ()  # of ids that are texts
        shapes, chunks = ([(size,), *((size, bytes_) for bytes_ in widths)] for size in (n, width))
        return {"dtype": ["int64", "int8"] if name == "ids" else ["int64"], "shape": shapes, "chunks": chunks}
    if name in WATCHED_ARRAYS:
        kept = (watched_count(n, chains * draws),)
        if name == "watched":
            return {"shape": [kept], "dtype": ["int64"], "chunks": [kept], "dimensions": [("watched",)]}
        shape = (chains, draws, *kept)
        return {"shape": [shape], "dtype": ["float32"], "chunks": [shape], "dimensions": [("chain", "draw", "watched")]}
    if name == "losses":
        return {"shape": [(chains, draws, n)], "dtype": ["float32"], "dimensions": [("chain", "draw", "sample")]}
    dtypes = [config["dtype"]] if MARK in config and "dtype" in config else ["float16", "float32"]
    if name == "tiles":
        side = min(config["tile"], n)
        return {"shape": [(n, n)], "dtype": dtypes, "chunks": [(side, side)], "dimensions": [("row", "column")]}
    assert name == "factor"
    chunk = min(config.get("factor_chunk") or CHUNK_SAMPLES, n)
    rows = chains * draws
    return {"shape": [(rows, n)], "dtype": dtypes, "chunks": [(rows, chunk)], "dimensions": [("draw", "sample")]}


def check_group(path: Path, group: Any, specs: Mapping[str, ArraySpec]) -> None:
    """Raise StoreError unless the group's `zarr.json` is one, and lists these arrays as they describe themselves."""
    what = f"zarr.json of {str(path)!r}"
    if not isinstance(group, dict) or (group.get("zarr_format"), group.get("node_type")) != (3, "group"):
        raise StoreError(f"{what} cannot be read: it describes no group")
    listed = group.get("consolidated_metadata")
    if listed is None:
        return
    arrays = listed.get("metadata") if isinstance(listed, dict) else None
    if not isinstance(arrays, dict):
        raise StoreError(f"{what} cannot be read: it lists no arrays")
    for name, spec in specs.items():
        if name in arrays and parse_spec(arrays[name], f"{what}: {name}") != spec:
            raise StoreError(f"{what} is damaged: it says something else of {name!r} than {name}/zarr.json")
