"""Small networks and data that several tests of heads and prefixes share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

HEAD_AT = "3"  # the name of `head_only`'s linear head


class Tally:
    """What a model notes of its passes, where lossk cannot see it: its attributes come back as they were."""

    __slots__ = ("count", "seen")

    def __init__(self) -> None:
        self.count, self.seen = 0, list[Any]()


class Counted(nn.Module):
    """Counts the samples that reach it."""

    def __init__(self) -> None:
        super().__init__()
        self.tally = Tally()

    def forward(self, x: Tensor) -> Tensor:
        self.tally.count += len(x)
        return x


def head_only() -> nn.Sequential:
    """A body, of which the sampled head at "3" needs the hidden states only; the same weights at every call."""
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), Counted(), nn.Linear(6, 3))


def vectors(num_samples: int = 19) -> tuple[Tensor, Tensor]:
    """Random inputs [N, 4] and labels of three classes."""
    return torch.randn(num_samples, 4), torch.arange(num_samples) % 3
