"""Where a result comes from: versions, commit, fingerprints, and the machine's measured speed."""

from __future__ import annotations

import functools
import hashlib
import platform
import resource
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import torch
from torch import nn


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that shape a result."""
    return dict(_versions())


@functools.cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("lossk", "torch", "numpy", "scipy", "zarr", "arviz-stats", "triton"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def git_sha() -> str | None:
    """The commit of the source tree lossk runs from, with "+" if it is changed; None for an installed copy.

    As it was when first asked for: that is nearest to the code that is running.
    """
    here = Path(__file__).resolve().parent
    try:
        if not any((parent / ".git").exists() for parent in here.parents):
            return None
        sha = _git(here, "rev-parse", "HEAD")
        if Path(_git(here, "rev-parse", "--show-toplevel")) / "src" / "lossk" != here:
            return None
        return sha + ("+" if _git(here, "status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    result = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=10
    )
    return result.stdout.strip()


def peak_rss_bytes() -> int:
    """The process's peak resident memory so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def model_fingerprint(model: nn.Module) -> str:
    """A digest of the names, shapes and bytes of a model's parameters and buffers."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        digest.update(f"{name}{tensor.dtype}{list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def multiply_add_rate() -> float:
    """Fused multiply-adds per second of a small rank update on this machine, measured (a few milliseconds)."""
    rows, best = torch.ones(64, 512, dtype=torch.float32, device="cpu"), float("inf")
    tile = torch.zeros(512, 512, dtype=torch.float32, device="cpu")  # 1 MB, so that no plan has to count it
    for _ in range(3):
        start = time.perf_counter()
        tile.addmm_(rows.T, rows)
        best = min(best, time.perf_counter() - start)
    return rows.shape[0] * tile.numel() / best
