"""Files as this package reads and writes them: whole, durable, bounded, never through a link, and named in errors.

What is written is moved to its name once it is on the disk. What is read is a regular file of a size that its reader
allows. A `StoreError` names the file, what is wrong and what to do.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from lossk.errors import StoreError
from lossk.optional import require

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
JSON_BYTES = 2**26  # the largest JSON file read or written; parsed, it can take 30 times as much
SHARED, ROOM_BYTES = Path("/dev/shm"), 2**20  # memory in a file's form; full, once it has less room than this
FLAGS = os.O_CLOEXEC | os.O_NONBLOCK  # a pipe that lies in a file's place answers at once

Bytes = bytes | bytearray | memoryview
Digest = tuple[int, int]  # bytes, and CRC-32C


@contextmanager
def full_disk_named(path: Path | None) -> Iterator[None]:
    """Name the store in an error of a disk, or quota, that is full: the system's own names no file.

    Raises:
        StoreError: instead of such an OSError.
        OSError: it is shared memory that is full, which a loader's workers use.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        if SHARED.is_dir() and shutil.disk_usage(SHARED).free < ROOM_BYTES:
            raise OSError(
                error.errno,
                f"{SHARED} is full ({error.strerror}): a DataLoader's workers pass their batches through it; give it "
                "num_workers=0, or make room",
            ) from error
        if path is None:
            raise
        raise StoreError(
            f"out={str(path)!r} cannot be written on, its disk is full ({error.strerror}); what is committed is safe: "
            "make room, and go on with resume=True"
        ) from error


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the file in an error of writing it, with what can be done.

    Raises:
        StoreError: instead of an OSError, unless that is of a folder that is not there, or of a name that is taken.
    """
    try:
        yield
    except (FileNotFoundError, FileExistsError):
        raise
    except OSError as error:
        said = f"{str(path)!r} cannot be written: "
        if error.errno in FULL:
            said += f"its disk is full ({error.strerror}); make room; a run goes on with resume=True"
        elif error.errno in FORBIDDEN:
            said += f"{error.strerror}; it must lie in a folder that you may write to"
        elif error.errno in (errno.ELOOP, errno.ENXIO):
            said += "something else than a file lies in its place, which is not written through; remove it"
        else:
            said += error.strerror or str(error)
        raise StoreError(said) from error


# --- writing -------------------------------------------------------------------------------------------------------


def replace_file(path: Path, *content: Bytes) -> None:
    """Write a file, or replace it, in one step, durably: data, then name."""
    write_part(path, *content)
    with naming(path):
        os.replace(part_of(path), path)
    sync(path.parent)


def part_of(path: Path) -> Path:
    """Where a file is written before it is moved to its name."""
    return path.with_name(f".{path.name}.part")


def write_part(path: Path, *content: Bytes) -> None:
    """The first half of `replace_file`: its content, durable under its name for the time being."""
    write_file(part_of(path), *content, durable=True)


def write_file(path: Path, *content: Bytes, durable: bool = False) -> None:
    """Write a file in its place, that nobody reads before `sync_tree` or a move."""
    with naming(path), _opened(path, os.O_WRONLY | os.O_CREAT) as descriptor:
        os.ftruncate(descriptor, 0)
        _write_all(descriptor, content)
        if durable:
            os.fsync(descriptor)


def append_file(path: Path, content: bytes) -> None:
    """Add to a file, or begin it, durably; a kill can leave the first part of what is added."""
    new = not path.exists()
    with naming(path), _opened(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) as descriptor:
        _write_all(descriptor, (content,))
        os.fsync(descriptor)
    if new:
        sync(path.parent)


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    """A file opened for writing: no link, symbolic or hard, no pipe and no device."""
    descriptor = os.open(path, flags | FLAGS | os.O_NOFOLLOW, 0o666)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
            raise StoreError(f"{str(path)!r} is a link, or no file: it is not written through; remove it")
        yield descriptor
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, content: tuple[Bytes, ...]) -> None:
    for part in content:
        rest = memoryview(part)
        while len(rest):
            rest = rest[os.write(descriptor, rest) :]


def make_folders(folder: Path, *, durable: bool = True) -> None:
    """Make a folder, and those above it that are not there, each durable in the one above it."""
    if folder.is_dir():
        return
    make_folders(folder.parent, durable=durable)
    with naming(folder):
        try:
            os.mkdir(folder)
        except FileExistsError:  # another rank made it, or it is a file
            if not folder.is_dir():
                raise
    if durable:
        sync(folder.parent)


def remove(path: Path) -> None:
    """Remove a file, a link itself, or a folder with what is in it, if it is there."""
    with naming(path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def sync_tree(path: Path) -> None:
    """fsync every file and folder under `path`."""
    for folder, _, files in os.walk(path):
        for name in files:
            sync(Path(folder) / name)
        sync(Path(folder))


def sync(path: Path) -> None:
    """fsync a file or a directory."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def forget(path: Path) -> None:
    """Have the system give back the memory in which it keeps a durable file, where it can be told to."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


# --- reading -------------------------------------------------------------------------------------------------------


def read_file(path: Path, most: int) -> bytes:
    """All of a regular file.

    Raises:
        FileNotFoundError: it is missing.
        StoreError: it is no file, larger than `most` bytes, or cannot be read.
    """
    return bytes(read_buffer(path, most))


def read_buffer(path: Path, most: int) -> bytearray:
    """The same, in memory that its reader may keep and change."""
    try:
        descriptor = os.open(path, os.O_RDONLY | FLAGS)
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise StoreError(f"{str(path)!r} is no file")
            if found.st_size > most:
                raise StoreError(f"{str(path)!r} has {found.st_size} bytes; at most {most} can be right")
            content = bytearray(found.st_size)
            with open(descriptor, "rb", buffering=0, closefd=False) as file:
                size = 0
                while size < len(content) and (count := file.readinto(memoryview(content)[size:])):
                    size += count
            return content[:size] if size < len(content) else content
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise
    except NotADirectoryError as error:
        raise FileNotFoundError(errno.ENOENT, "No such file", str(path)) from error
    except OSError as error:
        raise StoreError(f"{str(path)!r} cannot be read: {error.strerror or error}") from error


def extend_crc(value: int, content: bytes | np.ndarray) -> int:
    """CRC-32C of what `value` is that of, and then `content`."""
    module = require("google_crc32c", None, "a store", package="google-crc32c")  # a store's alone: not at import
    return int(module.extend(value, content))


def digest(*content: Bytes) -> Digest:
    """Of what a file holds."""
    value = 0
    for part in content:
        if len(part):  # what is read-only and has no bytes of its own, the function takes as an array only
            value = extend_crc(value, np.frombuffer(part, dtype=np.uint8))
    return sum(len(part) for part in content), value


def parse_json(content: bytes, what: str) -> Any:
    """JSON of any kind; `what` names it in errors.

    Raises:
        StoreError: it is not JSON, or nested too deeply.
    """
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{what} cannot be read: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        StoreError: it is missing, no JSON, or of another kind.
    """
    what = f"{path.name} of {str(path.parent)!r}"
    try:
        found = parse_json(read_file(path, JSON_BYTES), what)
    except FileNotFoundError as error:
        raise StoreError(f"{what} is missing") from error
    if not isinstance(found, dict):
        raise StoreError(f"{what} cannot be read: it holds no object")
    return found


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file in one step, durably."""
    replace_file(path, to_json(path, content))


def to_json(path: Path, content: Any) -> bytes:
    """The content of a JSON file that `read_json` will read."""
    text = json.dumps(content, indent=1, allow_nan=True).encode() + b"\n"
    if len(text) > JSON_BYTES:
        raise StoreError(f"{str(path)!r} would have {len(text)} bytes; at most {JSON_BYTES} are read")
    return text


def read_lines(path: Path) -> list[Any]:
    """The JSON of each line of a log, none where there is no log; a torn last line is not one."""
    if not path.exists():
        return []
    found = []
    for line in path.read_bytes().split(b"\n")[:-1]:  # every whole line ends in a newline
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found
