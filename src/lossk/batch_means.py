"""Monte Carlo errors of means of autocorrelated draws, from means of batches of every dyadic length.

The mean of batches of b draws has variance V_b / b; V_b grows with b from the variance of a draw to the long-run
variance sum_k gamma_k, which is what an error needs, and is the less certain the fewer the batches. The batch rule:
lengths 1, 2, 4, ... and whole chains, all about the mean over all chains; V is followed while it grows (as Geyer's
initial monotone sequence, 1992, follows autocovariances), and its last growth is added once more, which is what remains
where memory is geometric. So a slow component is seen wherever it is in the draws, in whole chains too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

NORMAL_95 = 1.959963984540054
FEWEST = 3  # batches at least, so that t has 2 degrees of freedom
REMAINDER = 0.75  # of the last growth is added: all of it remains of a geometric memory, none where it was chance


class Spread(NamedTuple):
    """Variance of a mean of many draws, and the batches it is taken from, less one; [...] float64."""

    variance: Tensor
    freedom: Tensor


def widening(freedom: float) -> float:
    """Quantile of Student's t over that of a normal law, both of 97.5 %."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.975)) / NORMAL_95


def spread_of_mean(series: Tensor) -> Spread:
    """Of the mean over all draws of series [C, T, ...], stationary along T, the chains independent; overwritten."""
    num_chains, num_draws = series.shape[:2]
    series -= series.mean(dim=(0, 1))
    lengths, counts, powers = [], [], []
    buffer = torch.empty_like(series)
    for each, sums in _batches(series):
        powers.append(torch.mul(sums, sums, out=buffer[:, : sums.shape[1]]).sum(dim=(0, 1)))
        lengths.append(each)
        counts.append(sums.shape[0] * sums.shape[1])
    beside = (-1, *[1] * (series.ndim - 2))
    size, count = (torch.tensor(x, dtype=torch.float64, device="cpu").view(beside) for x in (lengths, counts))
    found = torch.stack(powers).double() / (size * (count - 1))  # [L, ...]
    growing = torch.ones_like(found)
    growing[1:] = (found[1:] > found[:-1]).to(found.dtype).cumprod(dim=0)
    at = growing.sum(dim=0, keepdim=True).long() - 1  # the last that grew
    best = found.gather(0, at)
    growth = (best - found.gather(0, (at - 1).clamp(min=0))).masked_fill(at == len(lengths) - 1, 0.0)
    freedom = (count - 1).expand_as(found).gather(0, at)
    return Spread((best + REMAINDER * growth).squeeze(0) / (num_chains * num_draws), freedom.squeeze(0))


def _batches(series: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(b, sums [C, n, ...] over batches of b draws): b = 1, 2, 4, ..., T, as long as there are a few batches."""
    num_chains, num_draws = series.shape[:2]
    length, sums = 1, series
    yield length, sums
    while (count := num_draws // (2 * length)) >= 2 and num_chains * count >= FEWEST:
        sums = sums[:, 0 : 2 * count : 2] + sums[:, 1 : 2 * count : 2]
        length *= 2
        yield length, sums
    if num_chains >= FEWEST:
        yield num_draws, series.sum(dim=1, keepdim=True)
