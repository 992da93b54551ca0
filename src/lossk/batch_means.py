"""Monte Carlo errors of means of autocorrelated draws, from means of batches of every dyadic length.

The mean of batches of b draws has variance V_b / b; V_b grows with b from the variance of a draw to the long-run
variance sum_k gamma_k, which is what an error needs, and is the less certain the fewer the batches. The batch rule:
lengths 1, 2, 4, ... and whole chains, all about the mean over all chains; V is followed while it grows (as Geyer's
initial monotone sequence, 1992, follows autocovariances), and its last growth is added once more, which is what remains
where memory is geometric. So a slow component is seen wherever it is in the draws, in whole chains too. Errors are
widened by Student's t of the batches they rest on: +- 1.96 of them cover 95 %.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

NORMAL_95 = 1.959963984540054
FEWEST = 3  # batches at least, so that t has 2 degrees of freedom
TINY = torch.finfo(torch.float64).tiny


class Spread(NamedTuple):
    """Variance of a mean of many draws, and the batches it is taken from, less one; [...] float64."""

    variance: Tensor
    freedom: Tensor

    @property
    def error(self) -> Tensor:
        """[...] float64: the standard error, widened by t so that 1.96 of them cover 95 %."""
        return self.variance.sqrt() * widening(self.freedom)


def widening(freedom: Tensor) -> Tensor:
    """t quantile over normal quantile, both of 97.5 %, for degrees of freedom [...]; 1 for infinitely many."""
    from scipy.special import stdtrit

    known, where = np.unique(freedom.numpy(), return_inverse=True)
    factor = stdtrit(np.minimum(known, 1e9), 0.975) / NORMAL_95
    return torch.from_numpy(factor[where].reshape(freedom.shape))


def spread_of_mean(series: Tensor) -> Spread:
    """Of the mean over all draws of series [C, T, ...], stationary along T, the chains independent; overwritten."""
    num_chains, num_draws = series.shape[:2]
    series -= series.mean(dim=(0, 1))
    lengths, counts, powers, fourths = [], [], [], []
    buffer = torch.empty_like(series)
    for length, sums in _batches(series):
        squares = torch.mul(sums, sums, out=buffer[:, : sums.shape[1]])
        powers.append(squares.sum(dim=(0, 1)))
        fourths.append(squares.mul_(squares).sum(dim=(0, 1)))
        lengths.append(length)
        counts.append(sums.shape[0] * sums.shape[1])
    power, fourth = torch.stack(powers).double(), torch.stack(fourths).double()  # [L, ...]
    beside = (-1, *[1] * (series.ndim - 2))
    length, count = (torch.tensor(x, dtype=torch.float64, device="cpu").view(beside) for x in (lengths, counts))
    found = power / (length * (count - 1))
    growing = torch.ones_like(found)
    growing[1:] = (found[1:] > found[:-1]).to(found.dtype).cumprod(dim=0)
    at = growing.sum(dim=0, keepdim=True).long() - 1  # the last that grew
    best = found.gather(0, at)
    growth = (best - found.gather(0, (at - 1).clamp(min=0))).masked_fill(at == len(lengths) - 1, 0.0)
    freedom = _freedom(power, fourth, count).gather(0, at)
    return Spread((best + growth).squeeze(0) / (num_chains * num_draws), freedom.squeeze(0))


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


def _freedom(power: Tensor, fourth: Tensor, count: Tensor) -> Tensor:
    """Degrees of freedom of sums of squares of `count` numbers, from these and the sums of fourth powers.

    A variance of n numbers of kurtosis k is known as well as that of 2 n / (k - 1) normal ones: fewer than n - 1 where
    few draws make up most of it.
    """
    excess = (count * fourth / power.square().clamp(min=TINY) - 1.0).clamp(min=2.0)
    return torch.minimum(2.0 * count / excess, count - 1.0).clamp(min=1.0)
