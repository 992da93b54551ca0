"""Nearest neighbours with their significance: which of them chance alone would have shown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from scipy import stats
from torch import Tensor

from lossk.analysis.inputs import check_kernel
from lossk.indexing import resolve
from lossk.standard_error import bartlett_factor, method_for, pair_errors

if TYPE_CHECKING:
    from lossk.kernel import LossKernel


class SignificantNeighbors(NamedTuple):
    """The k most correlated (or most anti-correlated) other samples of N samples, and how far to trust each."""

    index: Tensor  # type: ignore[assignment]  # [N, k] int64; -1 where a sample has fewer than k
    correlation: Tensor  # [N, k] float32; 0 where the index is -1
    standard_error: Tensor  # [N, k] float32, of the correlation; NaN where the index is -1
    noise_floor: Tensor  # [N] float32: what the best of the unrelated samples would reach
    significant: Tensor  # [N, k] bool: |R| above the row's noise floor
    share: float  # significant ones among the N k; unrelated samples: about 1 / k for k of 3 or more
    by_chance: Tensor  # [N, k] float64: how many unrelated samples a row would show above this |R|; NaN at index -1


def significant_neighbors(
    kernel: LossKernel, k: int = 10, rows: Any = None, anti: bool = False
) -> SignificantNeighbors:
    """The k nearest neighbours of each sample, streamed over tiles, with standard errors and the noise floor.

    The noise floor is where one unrelated sample per row is expected (`kernel.neighbors`), so it says where noise
    begins, not that a neighbour just above it is certain. `by_chance` is that expected number for each neighbour (as
    BLAST's E-value): 1 at the floor, 0.01 where one row in a hundred would show such a neighbour by chance.

    `standard_error` is `kernel.standard_error`'s. `by_chance` takes unrelated traces for independent and AR(1): with
    lag-1 autocorrelations r and D = C (T - 1) draws a null correlation has D_eff = D (1 - r_i r_j) / (1 + r_i r_j)
    effective draws, and R sqrt(D_eff - 2) / sqrt(1 - R^2) is Student's t.

    Args:
        rows: the samples whose neighbours are wanted, as `kernel[rows]` takes; None = all.
        anti: the most anti-correlated instead, lowest first. There R below -noise_floor is significant.
    """
    kernel = check_kernel("kernel", kernel)
    found = kernel.neighbors(k, rows, anti=anti)
    here = torch.arange(kernel.num_samples, device="cpu") if rows is None else resolve(rows, kernel.num_samples, "rows")
    exists = found.index >= 0
    lag1 = kernel.lag1.clamp(-0.99, 0.99)
    draws = kernel.num_chains * (kernel.num_draws - 1)
    variance = bartlett_factor(lag1[here].unsqueeze(1) * lag1[found.index.clamp(min=0)]) / draws
    size = (-found.correlation if anti else found.correlation).double()
    method = method_for(kernel._blocks, watched=kernel._watched() is not None)
    if method == "products":
        none = torch.zeros(0, found.index.shape[1], dtype=torch.float32, device="cpu")
        pairs = zip(here.tolist(), found.index.clamp(min=0), strict=True)
        error = torch.cat([none, *(kernel.standard_error([i], index, correlation=True) for i, index in pairs)])
    else:
        fitted = kernel._fitted_errors if method == "watched" else None
        ends, known = (here.unsqueeze(1), found.index.clamp(min=0)), found.correlation.double()
        error = pair_errors(kernel._moments, fitted, *ends, known, correlation=True).float()
    error = error.masked_fill(~exists, float("nan"))
    freedom = (1 / variance - 2.0).clamp(min=1e-3)
    t = size * freedom.sqrt() / (1 - size.square()).clamp(min=1e-15).sqrt()
    others = max(int((~kernel.dead).sum()) - 1, 0)
    chance = others * torch.from_numpy(stats.t.sf(t.numpy(), freedom.numpy()))
    significant = exists & (size > found.noise_floor.unsqueeze(1))
    share = float(significant.double().mean()) if significant.numel() else 0.0
    return SignificantNeighbors(
        found.index,
        found.correlation,
        error,
        found.noise_floor,
        significant,
        share,
        chance.masked_fill(~exists, float("nan")),
    )
