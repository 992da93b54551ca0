"""How the work of one run is dealt to its ranks: chains by rows of a mesh, probe samples by columns, tiles by area.

Rank r stands in row r // shards, column r % shards. All ranks of a row step the same chain, which counter-based noise
makes the same to the bit, and each evaluates the probe on its own samples only; so nothing passes between ranks but
finished panels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from lossk.forms.blocks import upper_triangle

Key = tuple[int, int]


@dataclass(frozen=True)
class Mesh:
    """`rows` chains at a time, the probe of each over `shards` ranks."""

    rows: int
    shards: int

    @property
    def ranks(self) -> int:
        return self.rows * self.shards

    def place(self, rank: int) -> tuple[int, int]:
        """(row, shard) of a rank."""
        return divmod(rank, self.shards)

    def __str__(self) -> str:
        at_a_time = f"{self.rows} chain{'s' if self.rows > 1 else ''} at a time"
        return f"{self.ranks} ranks: {at_a_time}" + (f", {self.shards} ranks to a chain" if self.shards > 1 else "")


ONE_RANK = Mesh(1, 1)  # the mesh of a process alone


def choose_mesh(ranks: int, remaining: Sequence[int], step_seconds: float, probe_seconds: float) -> Mesh:
    """The quickest mesh: chains side by side share nothing; ranks that share a chain all repeat its steps.

    Args:
        remaining: draws still to be made of each unfinished chain.
        step_seconds: of the steps of one draw.
        probe_seconds: of one pass over all probe samples.
    """

    def seconds(rows: int) -> float:
        dealt = [sum(remaining[row::rows]) for row in range(rows)]
        return max(dealt, default=0) * (step_seconds + probe_seconds * rows / ranks)

    fitting = [rows for rows in range(1, ranks + 1) if ranks % rows == 0 and rows <= max(len(remaining), 1)]
    rows = min(fitting, key=lambda rows: (seconds(rows), -rows))
    return Mesh(rows, ranks // rows)


def deal_chains(chains: Sequence[int], mesh: Mesh) -> list[list[int]]:
    """The unfinished chains of each row."""
    return [list(chains[row :: mesh.rows]) for row in range(mesh.rows)]


@dataclass(frozen=True)
class Item:
    """One panel's work: draws [first_draw, first_draw + count) of a chain."""

    chain: int
    first_draw: int
    count: int


def schedule(dealt: Sequence[Sequence[int]], draws: Mapping[int, int], panel: int, num_draws: int) -> list[list[Item]]:
    """What each row works on in turn, a panel at a time.

    Args:
        draws: made already of each chain.
    """

    def items(chain: int) -> list[Item]:
        starts = range(draws.get(chain, 0), num_draws, panel)
        return [Item(chain, start, min(panel, num_draws - start)) for start in starts]

    return [[item for chain in chains for item in items(chain)] for chains in dealt]


def deal_tiles(shapes: Mapping[Key, tuple[int, int]], ranks: int) -> list[list[Key]]:
    """The tiles of each rank: runs of the upper triangle, row by row, of areas equal to within a tile."""
    total, done = sum(a * b for a, b in shapes.values()), 0
    dealt: list[list[Key]] = [[] for _ in range(ranks)]
    for key, (a, b) in shapes.items():
        middle = done + a * b / 2
        dealt[min(int(middle * ranks / total), ranks - 1)].append(key)
        done += a * b
    return dealt


def tile_shapes(spans: Sequence[slice]) -> dict[Key, tuple[int, int]]:
    """[rows, columns] of every tile of the upper triangle."""
    sides = [span.stop - span.start for span in spans]
    return {(i, j): (sides[i], sides[j]) for i, j in upper_triangle(len(sides))}


def deal_batches(num_samples: int, batch: int, shares: int) -> list[slice]:
    """Samples in runs of whole batches, one to a share, as equal as batches allow; the first is never empty."""
    batches = -(-num_samples // batch)
    ends = [min(-(-batches * share // shares) * batch, num_samples) for share in range(shares + 1)]
    return [slice(start, stop) for start, stop in pairwise(ends)]
