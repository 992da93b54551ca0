"""Watched samples: a few of the probe, evenly spread, whose own traces are kept beside a kernel in either form."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lossk.forms.blocks import Blocks, FactorBlocks, Moments

WATCHED = 256  # samples whose own traces are kept, evenly spaced over the probe
WATCHED_BYTES = 2**26  # of these traces: more than 65,536 draws in all are kept of fewer samples
LEAST = 8  # of these samples, however many draws


@dataclass(frozen=True)
class Watched:
    """Some samples' losses at every draw."""

    index: Tensor  # [w] int64, ascending: the samples
    losses: Tensor  # [C, T, w] float32, nats


def watched_count(num_samples: int, draws: int) -> int:
    """w, of a run of so many draws in all."""
    return min(num_samples, WATCHED, max(WATCHED_BYTES // (4 * max(draws, 1)), LEAST))


def watched_samples(num_samples: int, draws: int = 0) -> Tensor:
    """[w] int64: up to 256 samples, evenly spaced; fewer where so many draws in all take more than 64 MiB."""
    count = watched_count(num_samples, draws)
    return torch.linspace(0, num_samples - 1, count, dtype=torch.float32, device="cpu").round().long().unique()


def watched_bytes(num_samples: int, draws: int) -> int:
    """Of the traces that are kept of a run of so many draws in all."""
    return 4 * draws * watched_count(num_samples, draws)


def watched_in(blocks: Blocks, moments: Moments) -> Watched | None:
    """The watched samples' losses as a factor has them, within its rounding; None of tiles, which have no traces."""
    if not isinstance(blocks, FactorBlocks):
        return None
    index = watched_samples(blocks.num_samples, blocks.num_rows)
    centers = moments.chain_mean if moments.centering == "chain" else moments.mean.expand_as(moments.chain_mean)
    deviations = blocks.take(index).double() * moments.scale[index]
    losses = deviations.unflatten(0, (moments.num_chains, -1)) + centers[:, index].unsqueeze(1)
    return Watched(index, losses.float())


def wrong_index(index: np.ndarray, num_samples: int) -> str | None:
    """Why numbers cannot be those of watched samples; None where they can."""
    if (np.diff(index) <= 0).any() or index[0] < 0 or index[-1] >= num_samples:
        return f"it must hold ascending numbers of the {num_samples} samples"
    return None
