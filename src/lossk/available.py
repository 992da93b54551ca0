"""Memory that this process may still take: the least of what the machine, its limits, its group and its job allow.

A container or a batch job often has much less than the machine, and is killed, or told "DefaultCPUAllocator: can't
allocate memory", where a plan knows of the machine only.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

CGROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
MACHINE = "the machine"
FILES = (  # limit, current use and statistics of a group; of cgroup v2, then v1
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat", "total_inactive_file"),
)


@dataclass(frozen=True)
class Room:
    """Bytes that may still be taken, and what says so."""

    count: int
    by: str

    def in_words(self) -> str:
        """What is free, and where not the machine but a limit binds, which."""
        free = f"{gigabytes(self.count)} are free"
        return free if self.by == MACHINE else f"{free} by {self.by}"


def gigabytes(count: float) -> str:
    """A byte count for people."""
    if count < 1e6:
        return f"{count / 1e3:.0f} kB"
    return f"{count / 1e6:.0f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"


def available() -> Room:
    """The tightest of all limits on this process, now."""
    found = [Room(psutil.virtual_memory().available, MACHINE), *process_limits(), *job_limits(os.environ)]
    return min((*found, *group_limits(CGROUPS, OWN_GROUPS)), key=lambda room: room.count)


def available_bytes() -> int:
    """Bytes that this process may still take."""
    return available().count


def process_limits() -> Iterator[Room]:
    """`ulimit -v` and `ulimit -d`, less what the process has of either."""
    used = psutil.Process().memory_info()
    for name, kind, held in (
        ("ulimit -v", resource.RLIMIT_AS, used.vms), ("ulimit -d", resource.RLIMIT_DATA, getattr(used, "data", 0)),
    ):  # fmt: skip
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY:
            yield Room(max(limit - held, 0), name)


def group_limits(root: Path, own: Path) -> Iterator[Room]:
    """What the process's control group and every group above it have left; file pages that nobody uses are free.

    Args:
        root: where control groups are mounted.
        own: a file like /proc/self/cgroup, which names this process's groups.
    """
    for folder in _folders(root, own):
        for limit_name, used_name, statistics, idle in FILES:
            limit, used = _number(folder / limit_name), _number(folder / used_name)
            if limit is None or used is None:  # absent, or "max"
                continue
            cached = _field(folder / statistics, idle)
            yield Room(max(limit - max(used - cached, 0), 0), f"control group {folder}")


def job_limits(environment: Mapping[str, str]) -> Iterator[Room]:
    """What SLURM gave the job on this node (MB; 0 is all), less what this process holds."""
    held = psutil.Process().memory_info().rss
    per_node = _megabytes(environment.get("SLURM_MEM_PER_NODE"))
    if per_node:
        yield Room(max(per_node - held, 0), "SLURM_MEM_PER_NODE")
    per_cpu, cpus = _megabytes(environment.get("SLURM_MEM_PER_CPU")), environment.get("SLURM_CPUS_ON_NODE", "1")
    if per_cpu and cpus.isdecimal():
        yield Room(max(per_cpu * int(cpus) - held, 0), "SLURM_MEM_PER_CPU")


def _folders(root: Path, own: Path) -> list[Path]:
    """The folders of this process's memory groups, up to the root. Inside a container they may begin at the root."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return []
    found: dict[Path, None] = {}
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            tops = [root, root / "unified"]
        elif "memory" in controllers.split(","):
            tops = [root / "memory"]
        else:
            continue
        group = PurePosixPath(path.lstrip("/"))
        for top in tops:
            for each in (group, *group.parents):
                if ".." not in each.parts:
                    found[top / each] = None
    return list(found)


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _field(path: Path, name: str) -> int:
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return 0
    return next((int(line[1]) for line in lines if line[:1] == [name] and line[1].isdecimal()), 0)


def _megabytes(text: str | None) -> int:
    return int(text) * 2**20 if text is not None and text.isdecimal() else 0
