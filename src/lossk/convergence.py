"""Rank-normalised split R-hat and effective sample sizes of many traces at once.

Vehtari, Gelman, Simpson, Carpenter, Buerkner, "Rank-normalization, folding, and localization: an improved R-hat for
assessing convergence of MCMC", Bayesian Analysis 2021 (arXiv 1903.08008); the truncation of autocorrelations is that of
Geyer 1992. The numbers are ArviZ's, which the tests compare with; ArviZ goes through traces one by one in Python, which
took a tenth of a small network's run for the 256 samples that are watched.

Traces are [C, T, w] float64 (chains, draws, quantities), C >= 1, T >= 4; what is returned is [w], NaN where it is not
defined.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.fft import next_fast_len
from scipy.special import ndtri
from scipy.stats import rankdata

Array = npt.NDArray[np.float64]

FEWEST_DRAWS = 4
RESOLUTION = float(np.finfo(np.float64).resolution)


def rhat(traces: Array) -> Array:
    """The larger of the R-hats of ranks and of folded ranks, between half chains; NaN of a single chain."""
    if traces.shape[0] < 2:
        return np.full(traces.shape[2], np.nan)
    halves = _halves(traces)
    folded = np.abs(halves - np.median(halves, axis=(0, 1)))
    bulk, tail = _potential_reduction(_normal_scores(halves)), _potential_reduction(_normal_scores(folded))
    return np.where(tail > bulk, tail, bulk)


def bulk_ess(traces: Array) -> Array:
    """Effective draws of all chains together, of the ranks."""
    return _ess(_normal_scores(_halves(traces)))


def mean_ess(traces: Array) -> Array:
    """Effective draws of all chains together, for the mean."""
    return _ess(_halves(traces))


def mcse(traces: Array) -> Array:
    """Monte Carlo standard error of the mean over all draws of all chains."""
    return traces.std(axis=(0, 1), ddof=1) / np.sqrt(mean_ess(traces))


def _halves(traces: Array) -> Array:
    """[2 C, T // 2, w]: each chain as two; the middle one of an odd number of draws is dropped."""
    half = traces.shape[1] // 2
    return np.concatenate([traces[:, :half], traces[:, -half:]])


def _normal_scores(traces: Array) -> Array:
    """Normal quantiles of the ranks among all draws of a quantity, offset by 3/8 (Blom 1958)."""
    flat = traces.reshape(-1, traces.shape[2])
    ranks = rankdata(flat, method="average", axis=0)
    scores: Array = ndtri((ranks - 0.375) / (len(flat) + 0.25))
    return scores.reshape(traces.shape)


def _potential_reduction(traces: Array) -> Array:
    n = traces.shape[1]
    between = n * traces.mean(axis=1).var(axis=0, ddof=1)
    within = traces.var(axis=1, ddof=1).mean(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Array = np.sqrt((between / within + n - 1) / n)
    return found


def _ess(traces: Array) -> Array:
    chains, n, _ = traces.shape
    covariance = _autocovariance(traces)
    within = covariance[0] * n / (n - 1)
    total = covariance[0] + traces.mean(axis=1).var(axis=0, ddof=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        rho = 1.0 - (within - covariance) / total
    rho[0] = 1.0
    tau = np.maximum(_correlation_time(rho), 1.0 / np.log10(chains * n))
    constant = np.ptp(traces, axis=(0, 1)) < RESOLUTION
    return np.where(constant, float(chains * n), chains * n / tau)


def _autocovariance(traces: Array) -> Array:
    """[n, w]: at lags 0 to n - 1, sums divided by n, averaged over chains."""
    n = traces.shape[1]
    centred = traces - traces.mean(axis=1, keepdims=True)
    length = next_fast_len(2 * n, real=True)
    spectrum = np.fft.rfft(centred, n=length, axis=1)
    power = (spectrum.real**2 + spectrum.imag**2).mean(axis=0)
    found: Array = np.fft.irfft(power, n=length, axis=0)[:n] / n
    return found


def _correlation_time(rho: Array) -> Array:
    """-1 + 2 sum of rho [n, w], by Geyer's initial positive and monotone sequence of sums of neighbouring pairs."""
    n, w = rho.shape
    pairs = max((n - 3) // 2, 0) + 1  # as far as pairs are looked at
    sums = rho[: 2 * pairs : 2] + rho[1 : 2 * pairs : 2]  # [pairs, w]
    ends = ~(sums > 0)
    ends[-1] = True
    last = ends.argmax(axis=0)  # the first pair that is not positive, or the last one
    monotone = np.minimum.accumulate(sums, axis=0)
    counted = np.arange(pairs)[:, None] < last
    at = np.arange(w)
    even, both = rho[2 * last, at], sums[last, at]
    closing = np.where(both >= 0, even, np.maximum(even, 0.0))
    found: Array = -1.0 + 2.0 * np.where(counted, monotone, 0.0).sum(axis=0) + closing
    return found
