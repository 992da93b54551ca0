"""A switch of the whole process that several calls, of several threads, may want at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Switch:
    """What it was before the first call that wants it comes back after the last; meanwhile the latest counts."""

    read: Callable[[], Any]
    put: Callable[[Any], None]
    back: Callable[[Any], None]  # given what was read
    _wanted: list[list[Any]] = field(default_factory=list)  # of the calls within, each in a list of its own
    _before: Any = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def at(self, wanted: Any) -> Iterator[None]:
        """Within, the switch is as wanted, unless another thread wants it otherwise later."""
        mine = [wanted]
        with self._lock:
            if not self._wanted:
                self._before = self.read()
            self._wanted.append(mine)
            self.put(wanted)
        try:
            yield
        finally:
            with self._lock:
                self._wanted = [each for each in self._wanted if each is not mine]
                if self._wanted:
                    self.put(self._wanted[-1][0])
                else:
                    self.back(self._before)
