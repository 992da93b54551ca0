"""Monte Carlo standard errors of a kernel's entries: which method, and those that need no products of draws."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lossk.forms.blocks import Blocks, FactorBlocks, Moments
from lossk.kernel.product_errors import product_spread

if TYPE_CHECKING:
    from lossk.kernel.watched_errors import WatchedErrors

TINY = torch.finfo(torch.float64).tiny
METHODS = ("auto", "lag1", "watched", "products", "chains", "interval")


def bartlett_factor(product: Tensor) -> Tensor:
    """f = (1 + r_i r_j) / (1 - r_i r_j), from products of lag-1 autocorrelations: D / f draws are worth as many
    independent ones to a correlation (Bartlett 1935)."""
    return (1 + product) / (1 - product)


def lag1_error(moments: Moments, rows: Tensor, columns: Tensor, entry: Tensor, *, correlation: bool = False) -> Tensor:
    """sqrt((K_ii K_jj + K_ij^2) f / D), over the scales of both, or (1 - R_ij^2) sqrt(f / D); D = C (T - 1) draws.

    Args:
        entry: of K over the scales, or of R; rows, columns and it broadcast together. Float64.
    """
    lag1 = moments.lag1.clamp(-0.99, 0.99)
    factor = bartlett_factor(lag1[rows] * lag1[columns])
    relative = (factor / (moments.num_chains * (moments.num_draws - 1))).sqrt()
    if correlation:
        return (1 - entry.square()) * relative
    std = moments.variance.sqrt() / moments.scale
    return ((std[rows] * std[columns]).square() + entry.square()).sqrt() * relative


def method_for(blocks: Blocks, *, watched: bool = False) -> str:
    """What "auto" means: "interval" where the draws are in memory, else "watched" where some are kept, else "lag1"."""
    if isinstance(blocks, FactorBlocks):
        return "interval" if blocks.in_memory else "watched"
    return "watched" if watched else "lag1"


def from_draws(
    blocks: Blocks, moments: Moments, rows: Tensor, columns: Tensor, *, correlation: bool, method: str
) -> Tensor:
    """`product_spread` or `chain_spread` of a kernel: [r, c] float32.

    Raises:
        ValueError: the kernel is not what the method needs.
    """
    if not isinstance(blocks, FactorBlocks):
        raise ValueError(
            f"method={method!r} needs a kernel from traces (LossKernel.from_traces), got one of {blocks.kind}"
        )
    if method in ("products", "interval"):
        return product_spread(blocks, moments, rows, columns, correlation, wide=method == "interval")
    if moments.centering != "chain" or moments.num_chains < 2:
        raise ValueError(
            "method='chains' needs centering='chain' and at least 2 chains, got "
            f"{moments.centering!r}, {moments.num_chains}"
        )
    return chain_spread(blocks, moments, rows, columns, correlation)


def from_moments(
    blocks: Blocks, moments: Moments, fitted: WatchedErrors | None, rows: Tensor, columns: Tensor, *, correlation: bool
) -> Tensor:
    """Of "watched" or, with nothing fitted, of "lag1": [r, c] float32, nats^2 or, of correlations, 1."""
    known = None if fitted is None else fitted.block(rows, columns, correlation)
    if known is not None:
        return known
    entry, down = blocks.gather(rows, columns).double(), rows.unsqueeze(1)
    std = moments.variance.sqrt() / moments.scale
    size = std[down] * std[columns]
    entry = torch.where(down == columns, size, entry)
    if correlation:
        entry = (entry / size.clamp(min=TINY)).clamp(-1.0, 1.0).masked_fill(down == columns, 1.0)
    error = pair_errors(moments, fitted, down, columns, entry, correlation=correlation)
    if not correlation:
        error = error * moments.scale[down] * moments.scale[columns]
    return error.float()


def pair_errors(
    moments: Moments, fitted: WatchedErrors | None, rows: Tensor, columns: Tensor, entry: Tensor, *, correlation: bool
) -> Tensor:
    """The same of single pairs, whose entries are known: rows, columns and entry broadcast together; float64."""
    if fitted is None:
        return lag1_error(moments, rows, columns, entry, correlation=correlation)
    return (fitted.correlation_error if correlation else fitted.covariance_error)(rows, columns, entry)


def chain_spread(blocks: FactorBlocks, moments: Moments, rows: Tensor, columns: Tensor, correlation: bool) -> Tensor:
    """The spread of the C chains' own kernels over sqrt(C): [r, c] float32, nats^2 or, of correlations, 1.

    The factor must be centered by chain, and C at least 2.
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
