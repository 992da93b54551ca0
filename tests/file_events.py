"""Every change that this process makes to the files below a folder, seen one by one before and after it is made."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lossk.disk.swap

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
ONE = ("mkdir", "rmdir", "unlink", "remove")  # take a path
TWO = ("rename", "replace", "link")  # take two
OPEN = ("write", "pwrite", "ftruncate", "fsync")  # take a descriptor

before_tests = {name: getattr(os, name) for name in (*ONE, *TWO, *OPEN, "open")}


@dataclass(frozen=True)
class Event:
    """One call: `name`, the path that it changes, and the other one of two."""

    name: str
    path: Path
    other: Path | None = None
    content: bytes = b""


def _path(path: Any, dir_fd: int | None = None) -> Path:
    if isinstance(path, int):
        return Path(os.readlink(f"/proc/self/fd/{path}"))
    path = Path(os.fsdecode(path))
    return path if dir_fd is None else Path(os.readlink(f"/proc/self/fd/{dir_fd}")) / path


@contextmanager
def watched(
    folder: Path, before: Callable[[Event], None], after: Callable[[Event], None] = lambda event: None, *,
    sync: bool = True,
) -> Iterator[None]:  # fmt: skip
    """Tell of every change below a folder, before and after it.

    Args:
        sync: False leaves out the syncs themselves: what they are for, only a loss of power shows.
    """

    def wrap(name: str) -> Callable[..., Any]:
        call = before_tests[name]

        def seen(*arguments: Any, **options: Any) -> Any:
            event = _event(name, arguments, options)
            if event is None or not event.path.is_relative_to(folder):
                return call(*arguments, **options)
            before(event)
            done = None if name == "fsync" and not sync else call(*arguments, **options)
            after(event)
            return done

        return seen

    exchange = lossk.disk.swap.exchange

    def exchanged(a: Path, b: Path) -> bool:
        event = Event("exchange", a, b)
        before(event)
        done = exchange(a, b)
        if done:
            after(event)
        return done

    for name in before_tests:
        setattr(os, name, wrap(name))
    lossk.disk.swap.exchange = exchanged
    try:
        yield
    finally:
        for name, call in before_tests.items():
            setattr(os, name, call)
        lossk.disk.swap.exchange = exchange


def _event(name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Event | None:
    if name == "open":
        if not arguments[1] & WRITING:
            return None
        return Event("open", _path(arguments[0], options.get("dir_fd")))
    if name in OPEN:
        content = bytes(arguments[1]) if name in ("write", "pwrite") else b""
        return Event(name, _path(arguments[0]), None, content)
    if name in ONE:
        return Event(name, _path(arguments[0], options.get("dir_fd")))
    return Event(name, _path(arguments[0]), _path(arguments[1]))


# --- what is on a disk once power is lost ----------------------------------------------------------------------------


class Disk:
    """A model of a disk: what has been written, and what of it would be there after a loss of power.

    A file's content is durable once it was synced, a folder's names once the folder was. With `names_too`, the sync of
    a file keeps its name as well, and those of the folders above it, as most file systems have it; strictly, it does
    not.
    """

    def __init__(self, root: Path, *, names_too: bool) -> None:
        self.root, self.names_too = root, names_too
        self.files: dict[int, list[bytes]] = {}  # every content since the last sync, the durable one first
        self.folders: dict[int, list[dict[str, int]]] = {0: [{}]}  # the same of names
        self._count = 0

    def take(self, event: Event) -> None:
        """Follow what was done."""
        if event.name in ("open", "write", "pwrite", "ftruncate"):
            self._wrote(event.path)
        elif event.name == "fsync":
            self._synced(event.path)
        elif event.name == "mkdir":
            self._change(event.path.parent, lambda names: names | {event.path.name: self._new(self.folders, {})})
        elif event.name in ("unlink", "remove", "rmdir"):
            self._change(event.path.parent, lambda names: _without(names, event.path.name))
        elif event.name in ("rename", "replace", "exchange"):
            self._moved(event)
        else:
            raise AssertionError(event)

    def _new(self, kind: dict[int, Any], content: Any) -> int:
        self._count += 1
        kind[self._count] = [content]
        return self._count

    def _number(self, path: Path) -> int:
        number = 0
        for name in path.relative_to(self.root).parts:
            number = self.folders[number][-1][name]
        return number

    def _change(self, folder: Path, change: Callable[[dict[str, int]], dict[str, int]]) -> None:
        versions = self.folders[self._number(folder)]
        versions.append(change(versions[-1]))

    def _wrote(self, path: Path) -> None:
        if path.name not in self.folders[self._number(path.parent)][-1]:
            self._change(path.parent, lambda names: names | {path.name: self._new(self.files, b"")})
        self.files[self._number(path)].append(path.read_bytes())

    def _synced(self, path: Path) -> None:
        number = self._number(path)
        kind: dict[int, Any] = self.folders if number in self.folders else self.files
        del kind[number][:-1]
        while self.names_too and path != self.root and kind is self.files:
            folder = self.folders[self._number(path.parent)]
            folder[:] = [names | {path.name: self._number(path)} for names in folder]
            path = path.parent

    def _moved(self, event: Event) -> None:
        assert event.other is not None
        assert event.path.parent == event.other.parent, "names of one folder, which one sync keeps"
        a, b = event.path.name, event.other.name

        def move(names: dict[str, int]) -> dict[str, int]:
            swapped = {b: names[a], a: names[b]} if event.name == "exchange" else {b: names[a]}
            return _without(names, a, b) | swapped

        self._change(event.path.parent, move)

    def write(self, target: Path, names: Callable[[list[Any]], Any], content: Callable[[list[bytes]], bytes]) -> None:
        """Make what is left, of each folder's and each file's versions the one that is chosen."""
        self._write(0, target, names, content)

    def _write(self, number: int, target: Path, names: Callable, content: Callable) -> None:
        target.mkdir()
        for name, other in names(self.folders[number]).items():
            if other in self.folders:
                self._write(other, target / name, names, content)
            else:
                (target / name).write_bytes(content(self.files[other]))


def _without(names: dict[str, int], *gone: str) -> dict[str, int]:
    return {name: number for name, number in names.items() if name not in gone}
