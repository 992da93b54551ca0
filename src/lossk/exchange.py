"""Panels between ranks: each sends the draws of its own samples, all receive all of them, while work goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lossk.chain import Draw, numbers_of
from lossk.distributed import Ranks
from lossk.mesh import Item, Mesh
from lossk.panel import Panel

NUMBERS = 7  # float64 beside each draw's losses: the panel's last step, and six numbers of the draw


@dataclass(frozen=True)
class Received:
    """A panel of one row of the mesh, whole."""

    row: int
    chain: int
    first_draw: int
    step: int  # of the chain, after the last draw
    losses: Tensor  # [k, N] float32, nats
    draws: list[Draw]


class Exchange:
    """One all-gather at a time, begun by `send` and ended by `receive`; bits arrive as they were sent.

    Args:
        rows: the kernel rows of each shard of the mesh.
        panel: draws at most.
    """

    def __init__(self, ranks: Ranks, mesh: Mesh, rows: Sequence[slice], panel: int) -> None:
        self.ranks, self.mesh, self.rows = ranks, mesh, rows
        self.width = max(span.stop - span.start for span in rows)
        shape = (panel, self.width + 2 * NUMBERS)
        self._sent = torch.zeros(shape, device=ranks.device, dtype=torch.float32)
        self._received = [torch.zeros(shape, device=ranks.device, dtype=torch.float32) for _ in range(ranks.size)]
        self._items: list[Item | None] = []
        self._work: dist.Work | None = None

    def send(self, items: Sequence[Item | None], part: Panel | None) -> None:
        """Begin to gather what every row has made; `part` is this rank's, whose memory is free again on return."""
        assert self._work is None
        self._items = list(items)
        if part is not None:
            k, samples = part.losses.shape
            numbers = [[part.state.step, *numbers_of(draw)] for draw in part.draws]
            self._sent[:k, :samples] = part.losses
            self._sent[:k, self.width :] = torch.tensor(numbers, dtype=torch.float64, device="cpu").view(torch.float32)
        with self.ranks.watched():
            self._work = dist.all_gather(self._received, self._sent, group=self.ranks.panel_group, async_op=True)

    def receive(self) -> list[Received]:
        """Wait for what `send` began: the panels of the rows that had one."""
        assert self._work is not None
        with self.ranks.watched():
            self._work.wait()
            if self.ranks.device.type == "cuda":
                torch.cuda.synchronize(self.ranks.device)
        self._work = None
        return [self._assemble(row, item) for row, item in enumerate(self._items) if item is not None]

    def _assemble(self, row: int, item: Item) -> Received:
        losses = torch.empty(item.count, self.rows[-1].stop, dtype=torch.float32, device="cpu")
        parts = self._received[row * self.mesh.shards : (row + 1) * self.mesh.shards]
        for span, part in zip(self.rows, parts, strict=True):
            losses[:, span] = part[: item.count, : span.stop - span.start].cpu()
        numbers = parts[0][: item.count, self.width :].cpu().contiguous().view(torch.float64).tolist()
        draws = [Draw(item.chain, item.first_draw + i, *found[1:]) for i, found in enumerate(numbers)]
        return Received(row, item.chain, item.first_draw, int(numbers[-1][0]), losses, draws)
