"""What a number means nothing without: machine, versions, commit, and how busy the machine was."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from lossk.ops import extension
from lossk.provenance import git_sha, versions

ROOT = Path(__file__).resolve().parents[1]


def environment(threads: int) -> dict[str, Any]:
    """Machine, versions, git sha ("+" for uncommitted changes), and the load before anything is measured."""
    return {
        "device": processor(),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "threads": threads,
        "simd": extension.load().simd("auto"),
        "load_average": round(os.getloadavg()[0], 2),
        "versions": versions(),
        "git_sha": git_sha() or "unknown",
    }


def processor() -> str:
    """The processor's own name, where the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def described(packages: dict[str, str]) -> str:
    """Packages and their versions in one line."""
    return ", ".join(f"{name} {version}" for name, version in packages.items())


def deliver(text: str, record: Mapping[str, Any], name: str, *, out: Path | None, target: Path | None) -> None:
    """Print a page, or write it to `out` and its record to `target` (default: bench/results/NAME.json)."""
    if out is None:
        print(text)
        return
    out.write_text(text)
    target = target or Path(__file__).parent / "results" / f"{name}.json"
    target.write_text(json.dumps(record, indent=1) + "\n")
