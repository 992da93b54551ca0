"""The memory budget of a call: what was asked for, within what is free."""

from __future__ import annotations

import ctypes
import math
import re
import sys
from dataclasses import dataclass, field
from typing import Any

import psutil

from lossk.available import available_bytes
from lossk.checks import check_integer, wrong_kind, wrong_value
from lossk.provenance import peak_rss_bytes

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
MOST_BYTES = 2**63 - 1
FREE_SHARE = 0.95  # of what is free, that a run may plan with


def parse_memory(memory: Any) -> int | None:
    """A memory budget in bytes: a positive integer, text such as "8GB" or "500 MiB", or None.

    Raises:
        ValueError, TypeError: anything else.
    """
    if memory is None:
        return None
    if isinstance(memory, str):
        found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([A-Za-z]+)\s*", memory)
        if found is None or found[2].upper() not in UNITS:
            raise wrong_value("memory", "a number and a unit, such as '8GB', '500MB' or '2GiB',", memory)
        size = float(found[1]) * UNITS[found[2].upper()]
        if not 1 <= size <= MOST_BYTES:
            raise wrong_value("memory", "positive, and at most 8 EiB", memory)
        return int(size)
    try:
        return check_integer("memory", memory, 1, ceiling=MOST_BYTES)
    except TypeError:
        raise wrong_kind("memory", "a number of bytes, text such as '8GB', or None", memory) from None


@dataclass
class Marks:
    """What is noted of a call while it runs, for whoever holds its budget."""

    peak: int = 0  # bytes: the process's when passes began
    plan: int | None = None  # bytes: what the call is expected to take


@dataclass(frozen=True)
class Budget:
    """What a call may use beyond what its process held when it began. Bytes."""

    asked: int | None  # None: what is free
    held: int  # resident when the call began
    most_held: int | None = None  # the process's peak until then
    marks: Marks = field(default_factory=Marks)
    sharing: int = 1  # ranks on this machine, which share what is free

    @classmethod
    def now(cls, memory: int | str | None) -> Budget:
        """The budget of a call that begins now."""
        return cls(parse_memory(memory), _resident(), peak_rss_bytes())

    def taken(self) -> int:
        """What the call has taken already: data, weights, activations, libraries loaded at first use."""
        give_back()
        return max(_resident() - self.held, 0)

    def reached(self) -> int:
        """The call's peak so far; 0 where it is not known, as the process held more before the call."""
        peak = peak_rss_bytes()
        return 0 if self.most_held is None or peak <= self.most_held else peak - self.held

    def grown(self) -> int:
        """The same where it was reached after `mark`, else 0: reading data, say, tells nothing of passes."""
        return self.reached() if peak_rss_bytes() > self.marks.peak else 0

    def mark(self) -> None:
        """Data and model are held; passes begin."""
        self.marks.peak = peak_rss_bytes()

    def plan(self, peak: int) -> None:
        """The call is expected to take that much at its peak."""
        self.marks.plan = peak

    def planned(self) -> int | None:
        """What was last planned; None before that."""
        return self.marks.plan

    def limit(self, taken: int) -> int:
        """What the call may use in all: what was asked for, within this process's part of what is free."""
        free = taken + int(FREE_SHARE * available_bytes()) // self.sharing
        return free if self.asked is None else min(self.asked, free)


def give_back() -> None:
    """Have the C library return freed memory to the system, so that what is resident is what is held."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim is not None:
            trim(0)


def _resident() -> int:
    return psutil.Process().memory_info().rss


def as_setting(count: int) -> str:
    """A byte count as a value of `memory=`, rounded up."""
    return f"{math.ceil(count / 1e6)}MB"
