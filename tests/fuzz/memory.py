"""A limit on this process's memory: what asks for a terabyte fails as on any machine, and does not fill this one."""

from __future__ import annotations

import resource
from pathlib import Path

MORE = 8 * 2**30  # bytes beyond what is mapped already


def limit_memory() -> None:
    """Of the address space; torch maps several gigabytes of it by itself."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MORE
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
