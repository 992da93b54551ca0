"""The factor form made by a run: its centered, scaled draws [D, N] instead of tiles, in memory or in the store.

While draws are sampled only the moments are kept, and the draws themselves, in memory or in the log. At the end, with
every sample's center and scale known, the factor is (loss - center) / scale, each entry rounded once, a stripe of
samples at a time. It depends on the draws, the moments and `tile` only: made again, it is the same to the bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lossk.accumulate.runlog import RunLog
from lossk.accumulate.running import MomentsFirst
from lossk.accumulate.tiles import DTYPES
from lossk.disk.chunks import ArraySpec, Chunks
from lossk.disk.files import sync, sync_tree
from lossk.forms.blocks import FactorBlocks, Moments, tile_spans
from lossk.plan.layout import STRIPE
from lossk.store.stored_factor import StoredFactor


class HeldFactor(MomentsFirst):
    """In memory: 4 bytes per draw and sample, which the factor takes over (and 2 more of float16 while it is made)."""

    def __init__(
        self, num_samples: int, tile: int, *, num_chains: int, num_draws: int, centering: str, dtype: str
    ) -> None:
        super().__init__(
            num_samples, tile, num_chains=num_chains, num_draws=num_draws, centering=centering, dtype=dtype
        )
        self._losses = torch.empty(num_chains, num_draws, num_samples, dtype=torch.float32, device="cpu")
        self._made = [0] * num_chains

    def update(self, chain: int, panel: Tensor) -> None:
        super().update(chain, panel)
        first = self._made[chain]
        self._made[chain] += len(panel)
        self._losses[chain, first : self._made[chain]] = panel

    def finalize(self) -> tuple[FactorBlocks, Moments]:
        """The factor and the per-sample moments."""
        moments, losses = self.running.finish(), self._losses
        rows = losses.view(-1, self.num_samples)
        factor = rows if self.dtype == "float32" else torch.empty(rows.shape, dtype=DTYPES[self.dtype], device="cpu")
        for span in tile_spans(self.num_samples, STRIPE):
            factor[:, span] = scaled(losses[:, :, span], moments, span)
        return FactorBlocks(factor, self.running.freedom, self.tile), moments


class LoggedFactor(MomentsFirst):
    """In the store of `log`, written in chunks [D, tile] from the draws read back; no more than a few chunks are held.

    Args:
        share: (rank, ranks) where several processes write their own chunks into the array that one has prepared.
    """

    def __init__(
        self, log: RunLog, num_samples: int, tile: int, *, num_chains: int, num_draws: int, centering: str, dtype: str,
        share: tuple[int, int] = (0, 1),
    ) -> None:  # fmt: skip
        super().__init__(
            num_samples, tile, num_chains=num_chains, num_draws=num_draws, centering=centering, dtype=dtype
        )
        self.log, self.share = log, share

    def prepare(self) -> None:
        """Make the array, empty; `finalize`, of any process, comes after it."""
        create_factor(self.log, self.tile, self.dtype)

    def finalize(self) -> tuple[FactorBlocks, Moments]:
        """The factor and the per-sample moments."""
        moments, store = self.running.finish(), self.log.path
        array, known = Chunks.open(store, "factor"), self.log.known
        rank, ranks = self.share
        for i, span in list(enumerate(tile_spans(self.num_samples, array.chunks[1])))[rank::ranks]:
            values = scaled(self._read(span), moments, span).to(DTYPES[self.dtype]).numpy()
            known[array.key((0, i))] = array.write((0, i), values)
        return StoredFactor(Chunks.open(store, "factor", known), self.running.freedom, store), moments

    def _read(self, columns: slice) -> Tensor:
        """Some samples' draws: [C, T, s] float32."""
        shape = self.running.num_chains, self.running.num_draws, columns.stop - columns.start
        losses = torch.empty(shape, dtype=torch.float32, device="cpu")
        for commit in self.log.commits:
            losses[commit.chain, commit.first_draw : commit.end] = self.log.read_panel(commit, columns)
        return losses


def create_factor(log: RunLog, tile: int, dtype: str) -> None:
    """Make the array `factor` [D, N] of a store, empty, in place of one that a killed run may have left."""
    chains, draws, num_samples = log.losses.shape
    shape = (chains * draws, num_samples)
    spec = ArraySpec.of(shape, dtype, ("draw", "sample"), (shape[0], tile))
    Chunks.create(log.path, "factor", spec)
    sync_tree(log.path / "factor")
    sync(log.path)


def scaled(losses: Tensor, moments: Moments, columns: slice) -> Tensor:
    """(loss - center) / scale of some samples' draws [C, T, s]: [C T, s] float32, zeros for a sample without variance.

    The center is the sample's chain mean or, centered "pooled", its mean; deviations are formed in float64.
    """
    variance = moments.variance[columns]
    inverse = torch.where(variance > 0, 1.0 / moments.scale[columns], 0.0)
    centers = moments.chain_mean[:, columns]
    if moments.centering == "pooled":
        centers = moments.mean[columns].expand_as(centers)
    out = torch.empty(losses.shape, dtype=torch.float32, device="cpu")
    for chain, center in enumerate(centers):
        out[chain] = (losses[chain].double() - center) * inverse
    return out.view(-1, losses.shape[2])
