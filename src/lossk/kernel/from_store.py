"""A store as the kernel that its user reads."""

from __future__ import annotations

from pathlib import Path

from lossk.kernel.kernel import LossKernel
from lossk.store.contents import Contents
from lossk.store.store import read_contents


def open_kernel(path: str | Path) -> LossKernel:
    """Open a `.lossk` store for reading; tiles, and traces written by `TraceWriter`, stay on disk until asked for.

    Raises:
        StoreError: no store there, unfinished (with how far it got), damaged, or of a newer format.
    """
    return kernel_of(read_contents(path))


def kernel_of(contents: Contents) -> LossKernel:
    """The kernel that consists of these parts."""
    return LossKernel(
        contents.blocks,
        contents.moments,
        meta=contents.meta,
        diagnostics=contents.diagnostics,
        tokens=contents.tokens,
        sets=contents.sets,
        watched=contents.watched,
        names=contents.names,
    )
