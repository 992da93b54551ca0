"""Peak resident memory of this process from a moment on. Nothing of lossk: peers use it too."""

from __future__ import annotations

import gc
import resource
import sys
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class MemoryWatch:
    """From its making on: what the process holds then, and the most that it comes to hold."""

    def __init__(self) -> None:
        gc.collect()
        self.exact = _forget_peak()
        self.before = _status("VmRSS") if STATUS.exists() else _lifetime_peak()

    def bytes(self) -> dict[str, float]:
        """{"before", "peak", "above"}; where the system cannot forget a peak, an earlier one may hide this one."""
        peak = _status("VmHWM") if self.exact else _lifetime_peak()
        return {"before": self.before, "peak": peak, "above": peak - self.before}


def _forget_peak() -> bool:
    try:
        CLEAR.write_text("5")
    except OSError:
        return False
    return STATUS.exists()


def _status(key: str) -> int:
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024


def _lifetime_peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
