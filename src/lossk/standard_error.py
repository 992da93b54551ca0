"""Monte Carlo standard errors of a kernel's entries."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lossk.blocks import Blocks, FactorBlocks, Moments

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


METHODS = ("auto", "lag1", "products", "chains")


def method_for(blocks: Blocks) -> str:
    """What "auto" means: "products" where the draws are in memory, else "lag1"."""
    return "products" if isinstance(blocks, FactorBlocks) and blocks.in_memory else "lag1"


def from_draws(
    blocks: Blocks, moments: Moments, centering: str, method: str
) -> Callable[[Tensor, Tensor, bool], Tensor]:
    """`product_spread` or `chain_spread` of a kernel: (rows, columns, correlation) -> [r, c].

    Raises:
        ValueError: the kernel is not what the method needs.
    """
    if not isinstance(blocks, FactorBlocks):
        raise ValueError(
            f"method={method!r} needs a kernel from traces (LossKernel.from_traces), got one of {blocks.kind}"
        )
    if method == "products":
        return partial(product_spread, blocks, moments)
    if centering != "chain" or moments.num_chains < 2:
        raise ValueError(
            f"method='chains' needs centering='chain' and at least 2 chains, got {centering!r}, {moments.num_chains}"
        )
    return partial(chain_spread, blocks, moments)


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


def product_spread(blocks: FactorBlocks, moments: Moments, rows: Tensor, columns: Tensor, correlation: bool) -> Tensor:
    """From the spread of the draws' own terms, whatever the law of the losses: [r, c] float32, nats^2 (or 1).

    An entry of K is the mean of x_i x_j, one of R to first order that of z_i z_j - R_ij (z_i^2 + z_j^2) / 2; the error
    of such a mean over D draws is sqrt(v (1 + r) / (1 - r) / D), v and r the terms' variance and lag-1 autocorrelation.
    """
    num_chains, freedom = moments.num_chains, moments.num_chains * (moments.num_draws - 1)
    a, b = blocks.take(rows).double(), blocks.take(columns).double()  # [D, r], [D, c]
    if correlation:
        a, b = (x / (x.square().sum(dim=0) / freedom).sqrt().clamp(min=TINY) for x in (a, b))
    if not a.shape[1]:
        return torch.zeros(0, b.shape[1], dtype=torch.float32, device="cpu")
    errors = []
    for one in a.T:  # a row at a time: its terms are [D, c]
        terms = one.unsqueeze(1) * b
        mean = terms.sum(dim=0) / freedom
        if correlation:
            terms = terms - mean * (one.square().unsqueeze(1) + b.square()) / 2
            mean = torch.zeros_like(mean)
        terms = (terms - mean).unflatten(0, (num_chains, -1))  # [C, T, c]
        power = terms.square().sum(dim=(0, 1))
        lag1 = (terms[:, 1:] * terms[:, :-1]).sum(dim=(0, 1)) / power.clamp(min=TINY)
        lag1 = lag1.clamp(-0.99, 0.99)
        errors.append((power / freedom * (1 + lag1) / (1 - lag1) / freedom).sqrt())
    error = torch.stack(errors)
    if not correlation:
        error *= moments.scale[rows].unsqueeze(1) * moments.scale[columns]
    return error.float()
