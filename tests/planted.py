"""Kernels with known blocks, for the tests of `lossk.analysis`."""

from __future__ import annotations

import torch
from torch import Tensor

import lossk


def planted_traces(
    labels: Tensor, *, shared: float = 0.7, num_chains: int = 4, num_draws: int = 100, dead: int = 0, seed: int = 0
) -> lossk.LossTraces:
    """Losses of samples that move with their block: R is `shared` inside a block and 0 across, up to sampling.

    Independent draws. The losses' deviations span five decades, as real ones do. The last `dead` samples are constant.
    """
    generator = torch.Generator().manual_seed(seed)
    count = len(labels)
    of_block = torch.randn(num_chains, num_draws, int(labels.max()) + 1, generator=generator, dtype=torch.float64)
    own = torch.randn(num_chains, num_draws, count, generator=generator, dtype=torch.float64)
    moves = shared**0.5 * of_block[:, :, labels] + (1 - shared) ** 0.5 * own
    size = 10.0 ** (-5 * torch.rand(count, generator=generator, dtype=torch.float64))
    losses = size * (3.0 + 0.1 * moves)
    if dead:
        losses[:, :, -dead:] = 0.25
    return lossk.LossTraces(losses)


def planted_kernel(labels: Tensor, **settings: float) -> lossk.LossKernel:
    """Its kernel in factor form."""
    return lossk.LossKernel.from_traces(planted_traces(labels, **settings))
