"""The traces that a run left in its store: its kernel in factor form, which knows its chains."""

from __future__ import annotations

from pathlib import Path

from lossk.available import available_bytes
from lossk.kernel.from_store import open_kernel
from lossk.kernel.kernel import LossKernel
from lossk.kernel.traces import LossTraces
from lossk.store.opened import OpenStore


def open_with_chains(path: str | Path) -> LossKernel:
    """`lossk.open`, but in factor form from the store's `losses` where they are there and fit into memory twice.

    The same numbers up to rounding, at the cost of reading C T N losses. A store without them opens as it is.
    """
    kernel, path = open_kernel(path), Path(path)
    if kernel.form == "factor" or not (path / "losses").is_dir():
        return kernel
    needed = 3 * 4 * kernel.num_chains * kernel.num_draws * kernel.num_samples
    if needed > 0.5 * available_bytes():
        return kernel
    traces = LossTraces(OpenStore(path).read("losses"), meta=kernel.meta, tokens=kernel.tokens, sets=kernel.sets)
    return LossKernel.from_traces(traces, centering=kernel.centering)
