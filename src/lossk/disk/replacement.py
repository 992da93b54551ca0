"""A run that replaces a store: the old one stays until the new one is complete, and then they change places.

The new store is made in a folder beside the old one, `.NAME.new/NAME`. A run that is cut off leaves it there, and a
resume goes on with it. The complete store is marked, and moved in one step: a mark at the target says that what lies in
the folder is the old store, whenever a kill comes.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from lossk.disk.files import make_folders, naming, remove, sync, write_file
from lossk.disk.locks import Claim
from lossk.disk.swap import REPLACED, change_places, clear_leftovers, folder_beside, recover, refuse_to_delete
from lossk.errors import StoreError


class Replacement:
    """Where a run makes its store, `path`: at its target, or beside it while there is something to replace.

    What is beside the target is this process's until `close`.

    Args:
        overwrite: replace what is at `target`; else, go on with a new store that is beside it.

    Raises:
        StoreError: `target` is no store, or one that another process writes or replaces.
    """

    def __init__(self, target: Path, *, overwrite: bool) -> None:
        recover(target)
        if overwrite:
            refuse_to_delete(target)
        self.target, self.overwrite, self.folder = target, overwrite, folder_beside(target)
        self._claim: Claim | None = None
        clear_leftovers(target)
        if self.folder.exists() or (overwrite and target.exists()):
            self._claim = self._take()
            clear_leftovers(self.folder / target.name)
        self.beside = (overwrite and target.exists()) or (self.folder / target.name).exists()

    @property
    def path(self) -> Path:
        return self.folder / self.target.name if self.beside else self.target

    def _take(self) -> Claim:
        if self.folder.is_symlink() or (self.target / REPLACED).exists():
            raise StoreError(f"{str(self.folder)!r} must be a folder of the run that replaces a store; remove it")
        make_folders(self.folder)
        claim = Claim(self.folder)
        if not claim.held:
            claim.release()
            raise StoreError(f"{str(self.target)!r} is being replaced by another process")
        return claim

    def begin(self) -> None:
        """With `overwrite`, remove what a run that was cut off has left beside the target."""
        if self.overwrite and self.beside:
            remove(self.folder / self.target.name)
            self.beside = self.target.exists()

    def place(self) -> None:
        """Move the complete store to its target, and remove what was there.

        Raises:
            StoreError: another process writes what is there; the new store stays beside it.
        """
        if not self.beside:
            return
        refuse_to_delete(self.target)
        with naming(self.target):
            if self.target.exists():
                write_file(self.path / REPLACED, durable=True)
                sync(self.path)
                change_places(self.path, self.target)
            else:
                os.rename(self.path, self.target)
            sync(self.target.parent)
        remove(self.folder / self.target.name)
        remove(self.target / REPLACED)
        self.beside = False

    def close(self) -> None:
        """Let another process replace the target; a store that is not complete stays in its folder."""
        if self._claim is not None:
            with suppress(OSError):  # it is not empty
                os.rmdir(self.folder)
            self._claim.release()
            self._claim = None
