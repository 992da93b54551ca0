"""Kernels of panels of losses, by the streaming engine alone."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lossk.accumulate.tiles import TileAccumulator
from lossk.forms.watched import Watched, watched_samples
from lossk.kernel.kernel import LossKernel


def kernel_from_panels(
    panels: Iterable[tuple[int, Tensor]],
    num_samples: int,
    *,
    num_chains: int,
    num_draws: int,
    tile: int = 4096,
    centering: str = "chain",
    dtype: str = "float32",
) -> LossKernel:
    """The kernel of (chain, losses [k, N]), chains in order."""
    accumulator = TileAccumulator(
        num_samples, tile, num_chains=num_chains, num_draws=num_draws, centering=centering, dtype=dtype
    )
    index, kept = watched_samples(num_samples, num_chains * num_draws), []
    for chain, losses in panels:
        accumulator.update(chain, losses)
        kept.append(losses[:, index].float().cpu())
    blocks, moments = accumulator.finalize()
    watched = Watched(index, torch.cat(kept).unflatten(0, (num_chains, num_draws)))
    return LossKernel(blocks, moments, watched=watched)
