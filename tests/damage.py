"""What can be done to the files of a store, and stores to do it to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zarr
from zarr.codecs import Crc32cCodec

from lossk.disk.chunks import Chunks
from lossk.disk.sealed import read_sealed, write_sealed
from lossk.store.manifest import ARRAYS, COMPLETE, DESCRIPTIONS, WATCHED_ARRAYS, digest_of, digests_of


def seal_again(path: Path) -> None:
    """Bring a store's checksums up to date, as whoever wrote wrong numbers would have written them."""
    files = {name: digest_of(path / name) for name in DESCRIPTIONS if (path / name).exists()}
    for name in (*ARRAYS, COMPLETE):
        if (path / name).is_dir():
            files |= digests_of(Chunks.open(path, name))
    write_sealed(path / "checksums.json", {"files": files})


def files_of(path: Path) -> list[str]:
    """Every file of a store, by its name in it; its lock is empty."""
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file() and file.name != ".lock")


def as_before(path: Path) -> None:
    """Make a finished store one of an earlier version: written by Zarr, zeros left out, no checksums of files."""
    (path / "checksums.json").unlink()
    for name in WATCHED_ARRAYS:
        shutil.rmtree(path / name, ignore_errors=True)
    config = read_sealed(path / "config.json")
    del config["checksums"]
    if "chosen" not in config:  # what a run was asked for has it
        del config["dtype"]
    (path / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    group = zarr.open_group(path, mode="r+", use_consolidated=False)
    for name in [name for name in (*ARRAYS, COMPLETE) if (path / name).is_dir()]:
        old = zarr.open_array(path / name, mode="r")
        values, names, chunks = old[...], old.metadata.dimension_names, old.chunks
        shutil.rmtree(path / name)
        whole = {"write_empty_chunks": name in ("losses", "tiles") or "factor_chunk" in config}
        new = group.create_array(
            name, shape=values.shape, dtype=values.dtype, chunks=chunks, dimension_names=names,
            compressors=[Crc32cCodec()], config=whole,
        )  # fmt: skip
        new[...] = values
        if name == "tiles":
            side = new.chunks[0]
            for i in range(1, -(-values.shape[0] // side)):
                for j in range(i):
                    (path / "tiles" / "c" / str(i) / str(j)).unlink()


# --- damages ---------------------------------------------------------------------------------------------------------


def removed(file: Path) -> None:
    file.unlink()


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


def halved(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def grown(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0\0\0\0")


def flipped(at: float) -> Callable[[Path], None]:
    """One bit of a byte, that far into the file."""

    def damage(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[int(at * (len(content) - 1))] ^= 1
        file.write_bytes(content)

    return damage


def binary(file: Path) -> None:
    """Bytes that are no text."""
    file.write_bytes(bytes(range(128, 256)) + file.read_bytes()[128:])


def nested(file: Path) -> None:
    file.write_bytes(b"[" * 100_000)


def listed(file: Path) -> None:
    """JSON of another kind."""
    file.write_bytes(b"[1, 2]\n")


def doubled_line(file: Path) -> None:
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([lines[0], *lines]))


def swapped_lines(file: Path) -> None:
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[-1:], *lines[1:-1], *lines[:1]]))


def lost_line(file: Path) -> None:
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[1:]))


def changed_text(before: bytes, after: bytes) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        content = file.read_bytes()
        assert before in content, (file, before)
        file.write_bytes(content.replace(before, after, 1))

    return damage


Damage = Callable[[Path], Any]
ANY: dict[str, Damage] = {
    "removed": removed,
    "emptied": emptied,
    "5 bytes cut off": truncated,
    "cut in half": halved,
    "4 bytes added": grown,
    "a bit of the first byte": flipped(0),
    "a bit in the middle": flipped(0.5),
    "a bit near the end": flipped(0.97),
    "a bit of the last byte": flipped(1),
}
TEXT: dict[str, Damage] = {"binary": binary, "nested deeply": nested, "JSON of another kind": listed}
LINES: dict[str, Damage] = {"line doubled": doubled_line, "lines swapped": swapped_lines, "line lost": lost_line}
