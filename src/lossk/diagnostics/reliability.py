"""How well a run determines R and K: what its two halves agree on, and how far its chains differ in size."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from lossk.diagnostics.batch_means import spread_of_mean, summed_squares
from lossk.optional import require

SPLITS = 10  # of the chains into halves, at most


def reliability(losses: Tensor) -> tuple[float | None, float | None]:
    """(of R, of K): the correlation over pairs of samples that another run of the same length would show.

    The correlation r of two halves' entries becomes 2 r / (1 + r) for all draws together (Spearman 1910, Brown 1910),
    the mean over splits of the chains into halves; of a single chain, its first and its last half. None where fewer
    than 3 samples vary, or a half has fewer than 2 draws.

    Args:
        losses: [C, T, w], of some samples.
    """
    chains = losses.double()
    if len(chains) == 1:
        chains = chains[0, : chains.shape[1] // 2 * 2].unflatten(0, (2, -1))
    if chains.shape[1] < 2:
        return None, None
    alive = torch.isfinite(chains).all(dim=(0, 1)) & (chains.var(dim=1) > 0).all(dim=0)
    if int(alive.sum()) < 3:
        return None, None
    deviations = chains[:, :, alive] - chains[:, :, alive].mean(dim=1, keepdim=True)
    kernels = torch.einsum("cti,ctj->cij", deviations, deviations) / (chains.shape[1] - 1)  # [C, w, w]
    pairs = tuple(torch.triu_indices(kernels.shape[1], kernels.shape[1], offset=1, device="cpu"))
    of_r, of_k = [], []
    for half in _halves(len(kernels)):
        one, other = (kernels[list(part)].mean(dim=0) for part in half)
        of_r.append(_correlation(_normalised(one)[pairs], _normalised(other)[pairs]))
        of_k.append(_correlation(one[pairs], other[pairs]))
    return _spearman_brown(of_r), _spearman_brown(of_k)


def size_error(losses: Tensor) -> float | None:
    """The relative standard error of the sum of all variances; None where it is unknown.

    By batches of every length (`lossk.diagnostics.batch_means`), whole chains among them: slow components are seen
    there, and where there are none the many short batches say it far better than a handful of chains (of four, the
    spread is off by half).

    Args:
        losses: [C, T, w], of some samples.
    """
    if losses.shape[1] < 4:
        return None
    squares = summed_squares(losses)
    total = float(squares.mean())
    if not (math.isfinite(total) and total > 0):
        return None
    return float(spread_of_mean(squares.unsqueeze(2)).variance) ** 0.5 / total


def mean_error(traces: np.ndarray) -> float:
    """The Monte Carlo standard error of the mean of [C, T], by ArviZ; NaN where it is too short, or never varies."""
    array_stats = require("arviz_stats.base", None, "a diagnosis", package="arviz-stats").array_stats  # slow to import

    if traces.shape[1] < 4 or not np.isfinite(traces).all() or np.ptp(traces) == 0:
        return math.nan
    return float(array_stats.mcse(traces[..., None], chain_axis=0, draw_axis=1, method="mean")[0])


def times_as_many(found: float, wanted: float) -> float:
    """Draws that make a reliability what is wanted, in units of the present ones (Spearman-Brown)."""
    return wanted * (1 - found) / (found * (1 - wanted)) if found > 0 else math.inf


def _halves(chains: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Splits of the chains into two equal parts, one chain left out where their number is odd."""
    half = chains // 2
    splits = (part for part in itertools.combinations(range(2 * half), half) if 0 in part)
    for part in itertools.islice(splits, SPLITS):
        yield part, tuple(chain for chain in range(2 * half) if chain not in part)


def _normalised(kernel: Tensor) -> Tensor:
    scale = kernel.diagonal().sqrt()
    return kernel / torch.outer(scale, scale)


def _correlation(one: Tensor, other: Tensor) -> float:
    """NaN where one of them never varies."""
    return float(torch.corrcoef(torch.stack((one, other)))[0, 1])


def _spearman_brown(halves: list[float]) -> float | None:
    mean = sum(halves) / len(halves)
    return 2 * mean / (1 + mean) if mean > -1 else None
