"""The processes of one run, as one of them sees them. A process alone is a world of one: it is asked the same things.

Each collective of a `World` returns what it is given, so that a run has one path, whatever the number of its processes.
`lossk.ranks.distributed.Ranks` is the world of several.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from lossk.timings import Timings

Made = TypeVar("Made")


class World:
    """This process, alone."""

    rank = 0
    size = 1
    local_size = 1  # ranks on this machine

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which decides, commits, prints, and writes descriptions."""
        return self.rank == 0

    def begin(self, timings: Timings, started: float) -> float:
        """Count what this rank waits for others in a run's timings; returns when the run began, for this rank."""
        return started

    def own_device(self, device: str | torch.device | None) -> str | torch.device | None:
        """The device of this rank's chains, of the one that was asked for."""
        return device

    def use_device(self, device: torch.device) -> None:
        """Have panels travel between the devices that chains run on. Called by every rank."""

    def barrier(self) -> None:
        """Wait for every rank."""

    def gather_json(self, content: Any) -> list[Any]:
        """Every rank's content, on every rank."""
        return [content]

    def decide(self, choose: Callable[[], Any]) -> Any:
        """What `choose` returns on rank 0, plain data, on every rank; where it raises there, every rank raises."""
        return choose()

    def first_makes(self, make: Callable[[], Made]) -> Made | None:
        """On rank 0, what `make` returns, whatever it is; None elsewhere. Where it raises, every rank raises."""
        return make()

    def together(self, work: Callable[[], Made]) -> Made:
        """What `work` returns on this rank, unless it raises a MemoryError on one: then every rank raises one."""
        return work()

    def agree(self, content: dict[str, Any]) -> None:
        """Refuse, on every rank, to go on unless all have the same content."""

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """A rank's tensor, on every rank; theirs, of the same shape and dtype, stays as it is."""
        return tensor

    def exchange_spans(self, vector: Tensor, spans: Sequence[slice]) -> None:
        """Fill a vector, on the CPU, of which each rank has its own span."""


ALONE = World()
