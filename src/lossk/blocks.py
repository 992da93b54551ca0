"""Two forms of the scaled covariance behind one interface: dense triangular tiles, and the low-rank factor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """What is known of each sample by itself. All [N] float64 unless noted."""

    mean: Tensor  # of the losses, nats
    variance: Tensor  # nats^2, with the kernel's centring and degrees of freedom
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

    def gather(self, rows: Tensor, columns: Tensor) -> Tensor:
        """[r, c] float32."""
        ...

    def read_tile(self, i: int, j: int) -> Tensor:
        """Tile (i, j), i <= j: float32."""
        ...


class TileBlocks:
    """Dense tiles of the upper triangle. `tiles` may be a plain dict or a lazily reading mapping."""

    kind = "tiles"

    def __init__(self, num_samples: int, tile: int, tiles: Mapping[tuple[int, int], Tensor]) -> None:
        self.num_samples, self.tile, self.tiles = num_samples, tile, tiles

    @property
    def dtype(self) -> torch.dtype:
        return self.tiles[0, 0].dtype

    def gather(self, rows: Tensor, columns: Tensor) -> Tensor:
        out = torch.empty(len(rows), len(columns))
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
        return self.tiles[i, j].float()


class FactorBlocks:
    """The centred, scaled traces F [D, N]: the scaled covariance is F'F / freedom. Rank at most D."""

    kind = "factor"

    def __init__(self, factor: Tensor, freedom: int, tile: int = 4096) -> None:
        self.factor, self.freedom = factor, freedom
        self.num_samples, self.tile = factor.shape[1], tile

    @property
    def dtype(self) -> torch.dtype:
        return self.factor.dtype

    def gather(self, rows: Tensor, columns: Tensor) -> Tensor:
        return self._product(self.factor[:, rows], self.factor[:, columns])

    def read_tile(self, i: int, j: int) -> Tensor:
        a, b = (self.factor[:, k * self.tile : (k + 1) * self.tile] for k in (i, j))
        return self._product(a, b)

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        return (a.float().T @ b.float()) / self.freedom
