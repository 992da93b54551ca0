"""Monte Carlo errors of means of autocorrelated draws, from means of batches of every dyadic length.

The mean of batches of b draws has variance V_b / b; V_b grows with b from the variance of a draw to the long-run
variance sum_k gamma_k, which is what an error needs, and is the less certain the fewer the batches. The batch rule:
lengths 1, 2, 4, ... and whole chains, all about the mean over all chains; V is followed while it grows (as Geyer's
initial monotone sequence, 1992, follows autocovariances), and its last growth is added once more, which is what remains
where memory is geometric. So a slow component is seen wherever it is in the draws, in whole chains too.

Means of skewed draws are skewed, and low where their own error is low. With c the skewness of the mean, that of the
draws over the root of their effective number n, Hall's exponential transformation (1992) makes the studentised mean
normal up to 1 / n; `reach` gives the symmetric interval whose two tails then hold 5 % together. The variance is known
with 2 n / (kurtosis - 1) degrees of freedom, and so is c, which is taken from its upper side.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

NORMAL_95 = 1.959963984540054
FEWEST = 3  # batches at least, so that t has 2 degrees of freedom
REMAINDER = 0.75  # of the last growth is added: all of it remains of a geometric memory, none where it was chance
MOST_SKEWNESS = 0.8  # of a mean: from 0.84 on Hall's transformation leaves more than 5 % below any interval
LEAST_FREEDOM = 2.0  # that heavy tails leave


class Spread(NamedTuple):
    """Variance of a mean of many draws, and what makes intervals of it; [...] float64."""

    variance: Tensor
    batches: Tensor  # that it is taken from, less one
    freedom: Tensor  # that the tails of the draws leave to it, at least 2
    skewness: Tensor  # of the mean, at least 0


def widening(freedom: float) -> float:
    """Quantile of Student's t over that of a normal law, both of 97.5 %."""
    return float(_widening(np.asarray(freedom)))


def _widening(freedom: np.ndarray) -> np.ndarray:
    from scipy.special import stdtrit

    return stdtrit(freedom, 0.975) / NORMAL_95


def reach(found: Spread) -> Tensor:
    """What an error is multiplied by, so that +- 1.96 of it hold 95 %: [...] float64, at least 1."""
    return _of_tails(found.freedom) * of_skewness(found)


def of_skewness(found: Spread) -> Tensor:
    """The part of `reach` that skewness has."""
    known, factors = _symmetric()
    skewness = found.skewness * _of_tails(found.freedom)
    return torch.from_numpy(np.interp(skewness.numpy(), known, factors)).reshape(skewness.shape)


def _of_tails(freedom: Tensor) -> Tensor:
    known, factors = _student()
    return torch.from_numpy(np.interp(1 / freedom.numpy(), known, factors)).reshape(freedom.shape)


@cache
def _student() -> tuple[np.ndarray, np.ndarray]:
    """1 / degrees of freedom, and the widening."""
    shares = np.linspace(0.0, 1 / LEAST_FREEDOM, 257)
    return shares, np.concatenate([[1.0], _widening(1 / shares[1:])])


@cache
def _symmetric() -> tuple[np.ndarray, np.ndarray]:
    """Skewnesses c of a mean, and half widths over 1.96 of intervals that 5 % of the studentised means T are outside
    of; with d = 2 c / 3 that of (exp(d T) - 1) / d + c / 6 is a standard normal law."""
    from scipy.special import ndtr

    c = np.linspace(1e-6, MOST_SKEWNESS, 129)
    low, high = np.ones(len(c)), np.full(len(c), 4 * NORMAL_95)
    for _ in range(50):
        half = (low + high) / 2
        above, below = (np.expm1(2 / 3 * c * t) / (2 / 3 * c) + c / 6 for t in (half, -half))
        outside = ndtr(-above) + ndtr(below) > 0.05
        low, high = np.where(outside, half, low), np.where(outside, high, half)
    return c, np.maximum(high / NORMAL_95, 1.0)


def spread_of_mean(series: Tensor) -> Spread:
    """Of the mean over all draws of series [C, T, ...], stationary along T, the chains independent; overwritten."""
    num_chains, num_draws = series.shape[:2]
    series -= series.mean(dim=(0, 1))
    lengths, counts, powers = [], [], []
    buffer = torch.empty_like(series)
    for each, sums in _batches(series):
        squares = torch.mul(sums, sums, out=buffer[:, : sums.shape[1]])
        powers.append(squares.sum(dim=(0, 1)))
        if each == 1:
            fourth = torch.linalg.vector_norm(squares, dim=(0, 1)).square()
            third = squares.mul_(sums).sum(dim=(0, 1))
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
    batches = (count - 1).expand_as(found).gather(0, at).squeeze(0)
    long_run = (best + REMAINDER * growth).squeeze(0)
    skewness, freedom = _shape(
        powers[0].double(), third.double(), fourth.double(), found[0] / long_run, float(count[0])
    )
    return Spread(long_run / (num_chains * num_draws), batches, freedom, skewness)


def summed_squares(losses: Tensor) -> Tensor:
    """[C, T] float64: squared distances from the mean over a chain's draws, summed over samples, of [C, T, w]."""
    chains = (chain.double() for chain in losses)
    return torch.stack([(chain - chain.mean(dim=0)).square().sum(dim=1) for chain in chains])


def _shape(second: Tensor, third: Tensor, fourth: Tensor, share: Tensor, draws: float) -> tuple[Tensor, Tensor]:
    """Skewness of the mean, and the freedom of its variance, from sums of powers of the draws' deviations.

    Args:
        share: of the draws that are effective.
    """
    alive = second > 0
    variance = torch.where(alive, second / draws, 1.0)
    effective = torch.where(alive, draws * share, draws)
    skewness = (third / draws).abs() / variance**1.5 / effective.sqrt()
    spread = (fourth / draws / variance.square() - 1).clamp(min=1e-9)
    freedom = (2 * effective / spread).clamp(min=LEAST_FREEDOM)
    return torch.where(alive, skewness, 0.0), torch.where(alive, freedom, torch.inf)


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
