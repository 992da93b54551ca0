"""Streaming accumulation of the kernel as dense tiles of its upper triangle.

Sample i is divided by s_i, a power of two near its standard deviation, so that tile entries are of order one whatever
the dynamic range of the losses; multiplying back is exact. s_i is fixed the first time sample i's running variance is
not zero: until then its deviations, and so all its entries, are exactly zero under any scale. A sample that later
outgrows its scale 65,536-fold gets a new one, so that no product of scaled entries can overflow.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lossk.accumulate.panel import ChainStatistics, ChainTotals
from lossk.accumulate.running import RunningMoments
from lossk.device import SideStream
from lossk.forms.blocks import Moments, TileBlocks, power_of_two_near, tile_spans, upper_triangle
from lossk.ops.rank_update import HALF, rank_update, rank_update_triangle

DTYPES = {"float32": torch.float32, "float16": torch.float16}
OUTGROWN = 2.0**16
# In float16 no entry may pass 65,504. Entries are at most sqrt(draws) running deviations, so this serves 65,000 draws.
OUTGROWN_FP16 = 2.0**8
BAND = 512  # rows of a diagonal tile updated at a time: fewer repeat less of it, more run nearer the GEMM peak


class TileAccumulator:
    """Accumulates panels into tiles; `finalize` turns the sums into covariances.

    Tiles hold the within-chain co-moments; the between-chain term of `centering="pooled"` is a rank C-1 update from
    the chain means at the end. Accumulation is in float32 on scaled entries.

    Args:
        device: where tiles, panels and moments are.
        backend: of the rank-k update, "torch" or "triton".
        precision: of its products with "triton" (`lossk.ops.rank_update.PRECISIONS`).
        keys: the tiles (i, j), i <= j, to accumulate; None is all of the upper triangle.
    """

    def __init__(
        self,
        num_samples: int,
        tile: int,
        *,
        num_chains: int,
        num_draws: int,
        centering: str = "chain",
        dtype: str = "float32",
        device: str | torch.device = "cpu",
        keys: Iterable[tuple[int, int]] | None = None,
        backend: str = "torch",
        precision: str = "fp32",
    ) -> None:
        self.num_samples, self.tile = num_samples, tile
        self.backend, self.precision = backend, precision
        self.num_chains, self.num_draws = num_chains, num_draws
        self.centering, self.dtype, self.device = centering, dtype, torch.device(device)
        self._side = SideStream(self.device)
        self.spans = tile_spans(num_samples, tile)
        own = upper_triangle(len(self.spans)) if keys is None else keys
        self.tiles = {(i, j): self._zeros(i, j) for i, j in own}
        # [N]; 0 while the sample has never varied
        self.scale = torch.zeros(num_samples, dtype=torch.float64, device=self.device)
        self.running = RunningMoments(
            num_samples, num_chains=num_chains, num_draws=num_draws, centering=centering, device=self.device
        )

    @property
    def totals(self) -> ChainTotals:
        """What the information criteria need of each chain."""
        return self.running.totals

    def _zeros(self, i: int, j: int) -> Tensor:
        rows, columns = self.spans[i], self.spans[j]
        shape = rows.stop - rows.start, columns.stop - columns.start
        return torch.zeros(shape, dtype=torch.float32, device=self.device)

    def update(self, chain: int, panel: Tensor) -> None:
        """Add the next draws of a chain; chains come one after the other.

        Args:
            panel: [k, N] float32, losses in nats.
        """
        panel = panel.to(self.device)
        half = HALF.get(self.precision, torch.float32) if self.backend == "triton" else torch.float32
        # Rows 16 columns apart in memory: the kernel then takes any tile's columns as they are.
        whole = torch.empty(len(panel) + 1, -(-self.num_samples // 16) * 16, dtype=half, device=self.device)
        rows = whole[:, : self.num_samples]
        before = self.scale.clone()
        for span, centered, statistics in self.running.add(chain, panel):
            self._fix_scale(span, statistics)
            rows[:, span] = centered * self._inverse_scale(span)
        changed = (before > 0) & (before != self.scale)
        if changed.any():
            self._multiply(torch.where(changed, before / self.scale, 1.0))
        self._add_rows(rows, self.precision)

    def _fix_scale(self, span: slice, statistics: ChainStatistics) -> None:
        scale, m2 = self.scale[span], statistics.m2
        deviation = (m2 / max(statistics.count - 1, 1)).sqrt()
        most = OUTGROWN_FP16 if (self.backend, self.precision) == ("triton", "fp16") else OUTGROWN
        fresh = ((scale == 0) & (m2 > 0)) | ((scale > 0) & (deviation > most * scale))
        scale.copy_(torch.where(fresh, power_of_two_near(deviation), scale))

    def _multiply(self, factor: Tensor) -> None:
        """Multiply row i and column i of the tiles by factor_i [N], a power of two: exact."""
        self._side.join()
        factor = factor.float().to(self.device)
        for (i, j), tile in self.tiles.items():
            tile *= factor[self.spans[i]].unsqueeze(1)
            tile *= factor[self.spans[j]]

    def _inverse_scale(self, span: slice) -> Tensor:
        scale = self.scale[span]
        return torch.where(scale > 0, 1.0 / scale, 0.0)

    def _add_rows(self, rows: Tensor, precision: str) -> None:
        with self._side.after(rows):  # beside the next draws' steps and passes
            for (i, j), tile in self.tiles.items():
                left, right = rows[:, self.spans[i]], rows[:, self.spans[j]]
                add_rows(tile, (i, j), left, right, backend=self.backend, precision=precision)

    def join(self) -> None:
        """Whatever the device does from here on comes after the updates so far."""
        self._side.join()

    def finalize(self) -> tuple[TileBlocks, Moments]:
        """Turn sums into covariances: the tiles in their stored dtype, and the per-sample moments."""
        moments = self.running.finish()
        if self.centering == "pooled":
            variance = moments.variance.to(self.device)
            fresh = (self.scale == 0) & (variance > 0)
            self.scale = torch.where(fresh, power_of_two_near(variance.sqrt()), self.scale)
            # In float32 whatever the precision: the spread of chain means has no bound in units of the scale.
            self._add_rows((self.running.between() * self._inverse_scale(slice(None))).float(), "fp32")
        self._normalise(moments.scale, self.running.freedom)
        return TileBlocks(self.num_samples, self.tile, self.tiles), moments

    def _normalise(self, scale: Tensor, freedom: int) -> None:
        self._multiply(self.scale / scale.to(self.device))  # 0 for a dead sample, whose entries are 0 already
        for key, tile in self.tiles.items():
            self.tiles[key] = finish_tile(tile, key, freedom, self.dtype)


def add_rows(
    tile: Tensor,
    key: tuple[int, int],
    rows_i: Tensor,
    rows_j: Tensor,
    *,
    backend: str = "torch",
    precision: str = "fp32",
) -> None:
    """Add rows_i' rows_j to tile `key`, [a, b] float32, in place; of a diagonal tile only the upper triangle counts."""
    if key[0] != key[1]:
        rank_update(tile, rows_i, rows_j, backend=backend, precision=precision)
        return
    if backend == "triton":
        rank_update_triangle(tile, rows_i, backend=backend, precision=precision)
        return
    for span in tile_spans(len(tile), BAND):  # blocks of the diagonal are done whole
        rank_update(tile[span, span.start :], rows_i[:, span], rows_i[:, span.start :])


def finish_tile(tile: Tensor, key: tuple[int, int], freedom: int, dtype: str) -> Tensor:
    """A tile of sums of products, float32, as the finished covariance in `dtype`; the sums are overwritten."""
    tile /= freedom
    if key[0] == key[1]:
        _mirror(tile)
    return tile.to(DTYPES[dtype])


def _mirror(tile: Tensor) -> None:
    """Copy a diagonal tile's upper triangle to its lower one, in place."""
    for span in tile_spans(len(tile), BAND):
        tile[span.stop :, span] = tile[span, span.stop :].T
        corner = tile[span, span]  # a product A'A need not come out of a GEMM exactly symmetric
        corner.copy_(corner.triu() + corner.triu(1).T)
