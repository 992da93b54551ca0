"""How much a call may still read, and whether into memory or into files."""

from __future__ import annotations

from pathlib import Path

from lossk.available import available_bytes, gigabytes
from lossk.data.spool import Spool, folders
from lossk.memory import FREE_SHARE, Budget, as_setting

SHARE = 2  # data of more than half of the memory go to files, by themselves


class Room:
    """Counts what a call has read, and refuses to read beyond `memory=` or beyond what is free on the machine.

    Args:
        data: "memory" or "spool" say where data go, "stream" that they go nowhere; "auto" has larger ones go to files.
        beside: a store that files may lie beside.
    """

    def __init__(self, budget: Budget | None = None, data: str = "memory", beside: Path | None = None) -> None:
        self._asked = None if budget is None else budget.asked
        self._data, self._beside = data, beside
        self._spool: Spool | None = None
        self.read = 0  # bytes, in memory

    @property
    def spool(self) -> Spool:
        """What makes files."""
        if self._spool is None:
            self._spool = Spool(*folders(self._beside))
        return self._spool

    @property
    def streams(self) -> bool:
        """Whether data are read again at every pass."""
        return self._data == "stream"

    def spools(self, size: int | None) -> bool:
        """Whether data of so many bytes go to files; None is of no known size.

        Raises:
            MemoryError: they were asked to, and the disk has no room.
        """
        if self._data in ("memory", "stream"):
            return False
        fits = size is None or size < self.spool.free
        if self._data == "spool" and not fits:
            raise MemoryError(f"data='spool': {gigabytes(size or 0)} of data, and {self.spool.folder} has less free")
        if self._data == "spool":
            return True
        return size is not None and fits and SHARE * (self.read + size) > self.limit

    @property
    def limit(self) -> int:
        """What all data may take in memory."""
        free = int(FREE_SHARE * available_bytes())
        return free if self._asked is None else min(free, self._asked)

    def check(self, more: int, what: str) -> None:
        """Raise a MemoryError if `more` bytes cannot be held beside those that are read already.

        Args:
            what: the subject of the message, with a verb.
        """
        free = int(FREE_SHARE * available_bytes())
        if more > free:
            raise MemoryError(
                f"{what}, and this machine has {gigabytes(free)} free: end the data earlier, or give fewer samples"
            )
        if self._asked is not None and self.read + more > self._asked:
            raise MemoryError(
                f"{what}, and memory={as_setting(self._asked)} allows {gigabytes(self._asked)} for the whole call: end "
                f"the data earlier, give fewer samples, or at least memory={as_setting(self.read + more)!r}"
            )
