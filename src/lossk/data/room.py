"""How much a call may still read into memory."""

from __future__ import annotations

from lossk.available import available_bytes, gigabytes
from lossk.memory import FREE_SHARE, Budget, as_setting


class Room:
    """Counts what a call has read, and refuses to read beyond `memory=` or beyond what is free on the machine."""

    def __init__(self, budget: Budget | None = None) -> None:
        self._asked = None if budget is None else budget.asked
        self.read = 0  # bytes

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
