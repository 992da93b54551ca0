"""Panels between ranks: each sends the draws of its own samples, all receive all of them, while work goes on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from lossk.accumulate.panel import Panel
from lossk.errors import DivergedError
from lossk.ranks.distributed import Ranks
from lossk.ranks.mesh import Item, Mesh
from lossk.ranks.world import World
from lossk.samplers.chain import Draw, numbers_of

NO_PANEL = -1.0  # in place of the panel's last step, from a rank whose chain has diverged
NUMBERS = 7  # float64 beside each draw's losses: the panel's last step, and six numbers of the draw


@dataclass(frozen=True)
class Received:
    """A panel of one row of the mesh, whole."""

    row: int
    chain: int
    first_draw: int
    step: int  # of the chain, after the last draw
    losses: Tensor  # [k, N] float32, nats; on the CPU, but for those of a process alone
    draws: list[Draw]

    def on_host(self) -> Received:
        """The same with its losses in host memory."""
        return self if self.losses.device.type == "cpu" else replace(self, losses=self.losses.cpu())


@dataclass(frozen=True)
class Turn:
    """What is worked on in one round."""

    items: Sequence[Item | None]  # of each row of the mesh
    part: Panel | None  # this rank's own
    error: DivergedError | None  # why it has none


def exchanged(
    world: World, mesh: Mesh, rows: Sequence[slice], panel: int, turns: Iterable[Turn]
) -> Iterator[tuple[list[Received], Panel | None]]:
    """The panels of every row, round by round, and this rank's own; valid until the next round is asked for.

    While the panels of one round are on their way the next ones are computed. A process alone has nothing to wait for.

    Args:
        rows: the kernel rows of each shard of the mesh.
        panel: draws at most.

    Raises:
        DivergedError: on every rank, with the same words, where a chain of one of them has diverged.
    """
    if not isinstance(world, Ranks):
        for turn in turns:
            if turn.part is None:
                assert turn.error is not None
                raise turn.error
            part = turn.part
            yield [Received(0, part.chain, part.first_draw, part.state.step, part.losses, part.draws)], part
        return
    exchange = Exchange(world, mesh, rows, panel)
    sent: Turn | None = None
    for turn in turns:
        if sent is not None:
            yield exchange.receive(), sent.part
        exchange.send(turn.items, turn.part, turn.error)
        sent = turn
    if sent is not None:
        yield exchange.receive(), sent.part


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
        self._error: DivergedError | None = None
        self._work: dist.Work | None = None

    def send(self, items: Sequence[Item | None], part: Panel | None, error: DivergedError | None = None) -> None:
        """Begin to gather what every row has made; `part` is this rank's, whose memory is free again on return.

        Args:
            error: why this rank has no panel: `receive` raises it on every rank.
        """
        assert self._work is None
        self._items, self._error = list(items), error
        if error is not None:
            self._sent[0, self.width :] = torch.full((NUMBERS,), NO_PANEL, dtype=torch.float64, device="cpu").view(
                torch.float32
            )
        if part is not None:
            k, samples = part.losses.shape
            numbers = [[part.state.step, *numbers_of(draw)] for draw in part.draws]
            self._sent[:k, :samples] = part.losses
            self._sent[:k, self.width :] = torch.tensor(numbers, dtype=torch.float64, device="cpu").view(torch.float32)
        with self.ranks.watched():
            self._work = dist.all_gather(self._received, self._sent, group=self.ranks.panel_group, async_op=True)

    def receive(self) -> list[Received]:
        """Wait for what `send` began: the panels of the rows that had one.

        Raises:
            DivergedError: on every rank, with the same words, where a chain of one of them has diverged.
        """
        assert self._work is not None
        with self.ranks.watched():
            self._work.wait()
            if self.ranks.device.type == "cuda":
                torch.cuda.synchronize(self.ranks.device)
        self._work = None
        if any(self._numbers(part, 1)[0][0] == NO_PANEL for part in self._received):
            found = self.ranks.gather_json(None if self._error is None else str(self._error))
            raise DivergedError(next(text for text in found if text is not None)) from self._error
        return [self._assemble(row, item) for row, item in enumerate(self._items) if item is not None]

    def _assemble(self, row: int, item: Item) -> Received:
        losses = torch.empty(item.count, self.rows[-1].stop, dtype=torch.float32, device="cpu")
        parts = self._received[row * self.mesh.shards : (row + 1) * self.mesh.shards]
        for span, part in zip(self.rows, parts, strict=True):
            losses[:, span] = part[: item.count, : span.stop - span.start].cpu()
        numbers = self._numbers(parts[0], item.count)
        draws = [Draw(item.chain, item.first_draw + i, *found[1:]) for i, found in enumerate(numbers)]
        return Received(row, item.chain, item.first_draw, int(numbers[-1][0]), losses, draws)

    def _numbers(self, part: Tensor, count: int) -> list[list[float]]:
        """What stands beside the losses of the first draws."""
        found: list[list[float]] = part[:count, self.width :].cpu().contiguous().view(torch.float64).tolist()
        return found
