"""Two forms of the scaled covariance behind one interface: dense triangular tiles, and the low-rank factor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lossk.ambient import without_autocast


@dataclass(frozen=True)
class Moments:
    """What is known of each sample by itself. All [N] float64 unless noted."""

    mean: Tensor  # of the losses, nats
    variance: Tensor  # nats^2, with the kernel's centering and degrees of freedom
    scale: Tensor  # s_i, a power of two within a factor sqrt(2) of the standard deviation
    chain_mean: Tensor  # [C, N]
    lag1: Tensor  # within-chain lag-1 autocorrelation of the losses
    num_chains: int
    num_draws: int  # per chain
    centering: str


def power_of_two_near(value: Tensor) -> Tensor:
    """The power of two nearest in logarithm, kept within the normal range of float32."""
    tiny = torch.finfo(torch.float64).tiny
    return torch.exp2(value.clamp(min=tiny).log2().round().clamp(-125, 125))


def tile_spans(num_samples: int, side: int) -> list[slice]:
    """The samples of each row (or column) of tiles; the last may be shorter."""
    return [slice(start, min(start + side, num_samples)) for start in range(0, num_samples, side)]


def upper_triangle(n: int) -> Iterator[tuple[int, int]]:
    """Tile indices (i, j), i <= j, row by row."""
    return ((i, j) for i in range(n) for j in range(i, n))


class Blocks(Protocol):
    """The covariance divided by s_i s_j, readable by blocks. Indices are 1-D int64 tensors within range."""

    num_samples: int
    tile: int
    kind: str  # "tiles" or "factor"

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device:
        """Where they are held; all but `tile_on` give host tensors."""
        ...

    def gather(self, rows: Tensor, columns: Tensor) -> Tensor:
        """[r, c] float32."""
        ...

    def read_tile(self, i: int, j: int) -> Tensor:
        """Tile (i, j), i <= j: float32."""
        ...

    def tile_on(self, i: int, j: int, device: torch.device) -> Tensor:
        """Tile (i, j), i <= j, on a device, in the dtype it is held in or float32."""
        ...

    def row_blocks(self, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Whole rows in parts: (columns, [r, columns] float32) for each column of tiles."""
        ...


class TileBlocks:
    """Dense tiles of the upper triangle. `tiles` may be a plain dict or a lazily reading mapping."""

    kind = "tiles"

    def __init__(self, num_samples: int, tile: int, tiles: Mapping[tuple[int, int], Tensor]) -> None:
        self.num_samples, self.tile, self.tiles = num_samples, tile, tiles

    @property
    def dtype(self) -> torch.dtype:
        return self.tiles[0, 0].dtype

    @property
    def device(self) -> torch.device:
        return self.tiles[0, 0].device

    def gather(self, rows: Tensor, columns: Tensor) -> Tensor:
        out = torch.empty(len(rows), len(columns), dtype=torch.float32, device="cpu")
        row_tile, column_tile = rows // self.tile, columns // self.tile
        for i in row_tile.unique().tolist():
            at = (row_tile == i).nonzero().squeeze(1)
            for j in column_tile.unique().tolist():
                to = (column_tile == j).nonzero().squeeze(1)
                within_i, within_j = rows[at] - i * self.tile, columns[to] - j * self.tile
                if i <= j:
                    part = self.tiles[i, j][within_i[:, None], within_j]
                else:
                    part = self.tiles[j, i][within_j[:, None], within_i].T
                out[at[:, None], to] = part.float().cpu()
        return out

    def read_tile(self, i: int, j: int) -> Tensor:
        return self.tiles[i, j].float().cpu()

    def tile_on(self, i: int, j: int, device: torch.device) -> Tensor:
        return self.tiles[i, j].to(device)

    def row_blocks(self, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
        spans = tile_spans(self.num_samples, self.tile)
        return ((span, self.gather(rows, torch.arange(span.start, span.stop, device="cpu"))) for span in spans)


class FactorBlocks:
    """The centered, scaled traces F [D, N]: the scaled covariance is F'F / freedom. Rank at most D.

    Whatever is done with the whole of F is done a stripe of samples at a time, so that F may lie on disk
    (`StoredFactor`): a subclass says how `take` and `stripe` read it.
    """

    kind = "factor"
    in_memory = True

    def __init__(self, factor: Tensor, freedom: int, tile: int = 4096) -> None:
        self.factor, self.freedom = factor, freedom
        self.num_rows, self.num_samples = factor.shape
        self.tile = tile

    @property
    def dtype(self) -> torch.dtype:
        return self.factor.dtype

    @property
    def device(self) -> torch.device:
        """Always the host: a stripe is moved when a tile is wanted elsewhere."""
        return torch.device("cpu")

    def take(self, index: Tensor) -> Tensor:
        """The columns of some samples: [D, r] float32."""
        return self.factor[:, index].float()

    def stripe(self, i: int) -> Tensor:
        """The columns of the samples of tile i: [D, n] float32."""
        return self.factor[:, i * self.tile : (i + 1) * self.tile].float()

    def stripes(self) -> Iterator[tuple[slice, Tensor]]:
        """All stripes in order, with the samples that they are of."""
        return ((span, self.stripe(i)) for i, span in enumerate(tile_spans(self.num_samples, self.tile)))

    def gather(self, rows: Tensor, columns: Tensor) -> Tensor:
        return self._product(self.take(rows), self.take(columns))

    def read_tile(self, i: int, j: int) -> Tensor:
        return self._product(self.stripe(i), self.stripe(j))

    def tile_on(self, i: int, j: int, device: torch.device) -> Tensor:
        return self._product(self.stripe(i).to(device), self.stripe(j).to(device))

    def row_blocks(self, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
        a = self.take(rows)
        return ((span, self._product(a, stripe)) for span, stripe in self.stripes())

    def matmul(self, v: Tensor) -> Tensor:
        """F'(F v) / freedom for v [N, m] float64, in float64: two passes over the factor."""
        inner = torch.zeros(self.num_rows, v.shape[1], dtype=torch.float64, device="cpu")
        for span, stripe in self.stripes():
            inner += stripe.double() @ v[span]
        out = torch.empty_like(v)
        for span, stripe in self.stripes():
            out[span] = stripe.double().T @ inner
        return out / self.freedom

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        with without_autocast():
            return (a.T @ b).div_(self.freedom)
