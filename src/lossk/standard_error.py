"""Monte Carlo standard errors of a kernel's entries."""

from __future__ import annotations

import torch
from torch import Tensor

from lossk.blocks import FactorBlocks, Moments

TINY = torch.finfo(torch.float64).tiny


def bartlett(moments: Moments, rows: Tensor, columns: Tensor) -> Tensor:
    """sqrt(f / D) of each pair, [r, c] float64: D = C (T - 1) draws."""
    lag1 = moments.lag1.clamp(-0.99, 0.99)
    factor = bartlett_factor(lag1[rows].unsqueeze(1) * lag1[columns])
    return (factor / (moments.num_chains * (moments.num_draws - 1))).sqrt()


def bartlett_factor(product: Tensor) -> Tensor:
    """f = (1 + r_i r_j) / (1 - r_i r_j), from products of lag-1 autocorrelations: D / f draws are worth as many
    independent ones to a correlation (Bartlett 1935)."""
    return (1 + product) / (1 - product)


def chain_spread(blocks: FactorBlocks, moments: Moments, rows: Tensor, columns: Tensor, correlation: bool) -> Tensor:
    """The spread of the C chains' own kernels over sqrt(C): [r, c] float32, nats^2 or, of correlations, 1.

    The factor must be centred by chain, and C at least 2.
    """
    num_draws, num_chains = moments.num_draws, moments.num_chains
    a = blocks.take(rows).double().split(num_draws)  # C times [T, r]
    b = blocks.take(columns).double().split(num_draws)
    kernels = torch.stack([x.T @ y for x, y in zip(a, b, strict=True)]) / (num_draws - 1)
    if correlation:
        spreads = [
            torch.stack([(part.square().sum(dim=0) / (num_draws - 1)).sqrt() for part in side]) for side in (a, b)
        ]
        size = spreads[0].unsqueeze(2) * spreads[1].unsqueeze(1)  # [C, r, c]
        kernels = torch.where(size > 0, kernels / size.clamp(min=TINY), 0.0)
    error = kernels.std(dim=0) / num_chains**0.5
    if not correlation:
        error *= moments.scale[rows].unsqueeze(1) * moments.scale[columns]
    return error.float()
