"""Stores of an earlier version: without checksums of whole files, and without a chunk where all its numbers are zero.

A chunk that is not there may then be one of zeros, or one that was lost. It is read as zeros only where others confirm
that it held nothing else: those of samples whose loss never varied.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lossk.disk.chunks import At, Chunks


class ZeroChunks(Chunks):
    """An array whose chunks of zeros were not written, once `zeros` is known: the coordinates of those."""

    zeros: frozenset[At] = frozenset()

    def is_there(self, at: At) -> bool:
        return at in self.zeros or super().is_there(at)

    def read(self, at: At) -> np.ndarray:
        if at in self.zeros and not self.file(at).exists():
            return np.zeros([side.stop - side.start for side in self.spec.region(at)], dtype=self.spec.dtype)
        return super().read(at)


def find_zeros(arrays: Mapping[str, ZeroChunks]) -> None:
    """Have the moments know which of their lost chunks held zeros, by each other.

    Raises:
        ChunkError: of a chunk of `scale`, which is never zero.
    """
    missing = {
        name: {at[-1] for at in array.spec.grid() if not array.file(at).exists()} for name, array in arrays.items()
    }
    for number in sorted(set().union(*missing.values())):
        at = (number,)
        if not (arrays["scale"].read(at) == 1).all():
            continue  # some sample of these varied: nothing of it is zero throughout
        gone = {name for name in missing if number in missing[name]}
        if "variance" not in gone and arrays["variance"].read(at).any():
            continue
        if {"variance", "lag1"} <= gone or "variance" not in gone:
            for name in gone & {"variance", "lag1"}:
                arrays[name].zeros |= {at}
        if {"mean", "chain_mean"} <= gone:
            arrays["mean"].zeros |= {at}
            arrays["chain_mean"].zeros |= {(0, number)}


def dead_chunks(factor: Chunks, dead: np.ndarray) -> frozenset[At]:
    """The chunks of a factor, of samples that never varied only: zeros, which an earlier version did not write."""
    return frozenset(at for at in factor.spec.grid() if dead[factor.spec.region(at)[1]].all())
