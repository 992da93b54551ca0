"""What is made beside its place and moved there in one step: whenever it is cut off, the old or the new is there."""

from __future__ import annotations

import ctypes
import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lossk.disk.files import make_folders, naming, remove, sync
from lossk.disk.locks import Claim, is_being_written
from lossk.errors import StoreError

RENAME_EXCHANGE, AT_FDCWD = 2, -100  # of Linux's renameat2
REPLACED = ".replaced"  # an empty file of a store that has replaced another, until that one is removed
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)


class Parts:
    """Where something is made before it is moved to `path`: a folder, or a file, of that name with a dot before it.

    It is this process's until `close`, which removes what is left of it. What a killed process left is removed first.
    """

    def __init__(self, path: Path, *, folder: bool = True) -> None:
        recover(path)
        make_folders(path.parent)
        clear_leftovers(path)
        self.path, self.target = path.with_name(f".{path.name}.{os.getpid()}.part"), path
        with naming(self.path):
            remove(self.path)
            if folder:
                os.mkdir(self.path)
            else:
                os.close(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666))
        self._claim = Claim(self.path)

    def place(self, *, overwrite: bool = False) -> None:
        """Move it to its place, from which an empty folder goes, or with `overwrite` any. It must be durable before."""
        with naming(self.target):
            if overwrite and self.target.is_dir():
                change_places(self.path, self.target)
            else:
                os.replace(self.path, self.target)
            sync(self.target.parent)

    def close(self) -> None:
        """Remove what is left."""
        try:
            remove(self.path)
        finally:
            self._claim.release()


@contextmanager
def in_one_step(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Where to write what is to lie at `path`: beside it, and moved there when the block ends without an error.

    Raises:
        FileExistsError: `path` exists and `overwrite` is False.
        StoreError: `path` is not a store, or one that is being written.
    """
    recover(path)
    if os.path.lexists(path) and not overwrite:
        raise FileExistsError(f"path {str(path)!r} exists; nothing is overwritten")
    refuse_to_delete(path)
    parts = Parts(path)
    try:
        yield parts.path
        refuse_to_delete(path)  # what has come there since
        if path.exists() and not overwrite:
            raise FileExistsError(f"path {str(path)!r} exists by now; nothing is overwritten")
        parts.place(overwrite=overwrite)
    finally:
        parts.close()


def refuse_to_delete(path: Path) -> None:
    """Raise StoreError unless a path may be overwritten: nothing is there, or a store that nobody is writing."""
    if path.is_symlink():
        raise StoreError(f"{str(path)!r} is a symbolic link; it will not be overwritten")
    if not path.exists():
        return
    if not (path.is_dir() and (path / "zarr.json").exists()):
        raise StoreError(f"{str(path)!r} is not a .lossk store; it will not be overwritten")
    if is_being_written(path):
        raise StoreError(f"{str(path)!r} is being written by another process")


def change_places(new: Path, target: Path) -> None:
    """Put a folder in the place of another, which then lies where the new one was, or is removed."""
    if exchange(new, target):
        return
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    claim = Claim(target)
    try:
        os.rename(target, old)
        os.rename(new, target)
        sync(target.parent)
        remove(old)
    finally:
        claim.release()


def clear_leftovers(path: Path) -> None:
    """Remove what killed processes left beside `path`: what they were making, and what they had replaced."""
    for left in (*_leftovers(path, "part"), *_leftovers(path, "old")):
        _remove_if_free(left)
    if (path / REPLACED).exists():
        _remove_if_free(folder_beside(path))
        if not folder_beside(path).exists():
            remove(path / REPLACED)


def folder_beside(path: Path) -> Path:
    """Where a run makes the store that is to replace the one at `path` (`lossk.disk.replacement`)."""
    return path.with_name(f".{path.name}.new")


def recover(path: Path) -> None:
    """Put back what was moved aside to make room, by a process that was killed before it had moved the new there."""
    for old in _leftovers(path, "old"):
        with suppress(OSError), _claimed(old) as free:
            if free and not os.path.lexists(path):
                os.rename(old, path)
                sync(path.parent)


def _leftovers(path: Path, end: str) -> list[Path]:
    """What stands beside `path` under the name that it has while it is made, or moved aside."""
    name = re.compile(rf"\.{re.escape(path.name)}\.\d+\.{end}")
    try:
        return sorted(path.parent / entry for entry in os.listdir(path.parent) if name.fullmatch(entry))
    except OSError:
        return []


def _remove_if_free(path: Path) -> None:
    """Remove what nobody is making any more."""
    with suppress(OSError, StoreError), _claimed(path) as free:
        if free:
            remove(path)


@contextmanager
def _claimed(path: Path) -> Iterator[bool]:
    """Whether it is this process's now, for the time of the block."""
    claim = Claim(path)
    try:
        yield claim.held and claim.known
    finally:
        claim.release()


def exchange(a: Path, b: Path) -> bool:
    """Have two paths change places in one step, where the system and its file system can.

    Raises:
        OSError: it could not be done.
    """
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if rename(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(b))
