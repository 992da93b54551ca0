"""Who writes a store: locks that end with the process that holds them."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

from lossk.disk.files import FLAGS, naming
from lossk.errors import StoreError

LOCK = ".lock"


class Lock:
    """An exclusive lock of a store that is written, held from here on until `release`.

    It lies on the file `.lock`, which goes when the store is finished. A file that was removed, or came to lie in
    another store, while it was waited for is nobody's lock: the one in its place is taken.

    Raises:
        StoreError: another process holds it, or the file system has no locks.
    """

    def __init__(self, store: Path) -> None:
        self.store, self.path = store, store / LOCK
        while True:
            with naming(self.path):
                self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | FLAGS, 0o666)
            try:
                self._take()
                if self._is_in_place():
                    return
            except BaseException:
                os.close(self._descriptor)
                raise
            os.close(self._descriptor)

    def _take(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreError(f"out={str(self.store)!r} is being written by another process") from error
        except OSError as error:
            raise StoreError(
                f"out={str(self.store)!r} lies on a file system without locks ({error.strerror}), on which two "
                "processes could write one store; write it on another, and copy it there once it is finished"
            ) from error

    def _is_in_place(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self.path, follow_symlinks=False))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Let another process write the store; a second time, nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class Claim:
    """A lock on a folder, or a file, itself: held by the process that makes it, so that nobody else clears it away.

    `held` is False where another process has it; `known` is False where the file system cannot say.
    """

    def __init__(self, path: Path) -> None:
        self.held, self.known = True, True
        self._descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | FLAGS)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.held = False
        except OSError as error:
            if error.errno == errno.EINTR:
                raise
            self.known = False

    def release(self) -> None:
        os.close(self._descriptor)


def is_being_written(store: Path) -> bool:
    """Whether a process holds the lock of a store."""
    try:
        claim = Claim(store / LOCK)
    except OSError:  # there is none
        return False
    claim.release()
    return not claim.held
