"""Errors of a kernel whose draws are not at hand, from the watched samples' own draws.

Of each pair of watched samples the error from the products of its draws is known, plain and as long as an interval
asks for (`lossk.kernel.product_errors`), and that of the lag-1 formula (`lossk.kernel.standard_error.lag1_error`). The
plain error's ratio to the formula's is fitted, in logarithms, as a quadratic function of what is known of every sample
(lag-1 autocorrelation, deviation over mean loss, spread of the chain means) and of the pair (R); other pairs' lag-1
errors are multiplied by it. Errors that are each uncertain by themselves are averaged by the fit, so it needs no longer
intervals; where all of them are uncertain together (few directions move all losses) the fit is as uncertain as each.
The part that is shared is seen in what the fit leaves, which is small then, and intervals are longer by that part.
Where all samples of a block are watched its errors are the intervals of their draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lossk.forms.blocks import FactorBlocks, Moments
from lossk.forms.centering import center, degrees_of_freedom, empty_moments, note
from lossk.forms.watched import Watched
from lossk.kernel.product_errors import both_spreads, product_spread
from lossk.kernel.standard_error import lag1_error

RIDGE = 1e-2  # of standardised features, per pair
FEWEST = 40  # pairs (or samples) per feature's worth of freedom: fewer fit a constant only
WIDEST = 16.0  # most that a fitted ratio may be, and the inverse of the least
SCATTER = 0.8  # variance of an error's logarithm over that of its reach: with Student's t of f degrees of freedom they
# are 1 / (2 f) and 1.2 / f, so 0.4, and as much again for differences between pairs that the features do not tell
TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class Fit:
    """log of (interval error / lag-1 error) as a linear function of features."""

    center: Tensor  # [f] float64
    spread: Tensor  # [f]
    slope: Tensor  # [f]
    level: float

    def ratio(self, features: Tensor) -> Tensor:
        """[...] float64 of features [..., f]."""
        inside = ((features - self.center) / self.spread).clamp(-3.0, 3.0)
        return (self.level + inside @ self.slope).exp().clamp(1 / WIDEST, WIDEST)


@dataclass(frozen=True)
class WatchedErrors:
    """What the watched samples say of all pairs' errors."""

    watched: Tensor  # [w] int64, ascending
    blocks: FactorBlocks  # of their traces
    moments: Moments  # of them
    of_all: Moments
    pairs: Fit
    own: Fit
    correlations: Fit

    def covariance_error(self, rows: Tensor, columns: Tensor, k: Tensor) -> Tensor:
        """Of entries k of K, over the scales of both samples; all three broadcast together; float64."""
        m = self.of_all
        size = ((m.variance[rows] * m.variance[columns]).sqrt() / (m.scale[rows] * m.scale[columns])).clamp(min=TINY)
        features = _features(m, rows, columns, (k / size).clamp(-1.0, 1.0))
        ratio = torch.where(rows == columns, self.own.ratio(features), self.pairs.ratio(features))
        return lag1_error(m, rows, columns, k) * ratio

    def correlation_error(self, rows: Tensor, columns: Tensor, r: Tensor) -> Tensor:
        """Of entries r of R; all three broadcast together; float64."""
        ratio = self.correlations.ratio(_features(self.of_all, rows, columns, r))
        error = lag1_error(self.of_all, rows, columns, r, correlation=True) * ratio
        return error.masked_fill(rows == columns, 0.0).clamp(max=1.0)

    def block(self, rows: Tensor, columns: Tensor, correlation: bool) -> Tensor | None:
        """[r, c] float32 from the draws themselves, where all of these samples are watched; else None."""
        at = [torch.searchsorted(self.watched, each).clamp(max=len(self.watched) - 1) for each in (rows, columns)]
        if not all(torch.equal(self.watched[i], each) for i, each in zip(at, (rows, columns), strict=True)):
            return None
        return product_spread(self.blocks, self.moments, at[0], at[1], correlation, wide=True)


def watched_errors(watched: Watched | None, moments: Moments) -> WatchedErrors:
    """Fit the ratios of the watched samples' errors.

    Raises:
        ValueError: there are none.
    """
    if watched is None:
        raise ValueError("method='watched' needs a kernel that keeps some traces, got a store of an earlier version")
    chains, draws, count = watched.losses.shape
    own, at = empty_moments(chains, draws, count, moments.centering), torch.arange(count, device="cpu")
    centered = center(watched.losses, moments.centering)
    note(own, slice(0, count), centered)
    blocks = FactorBlocks(centered.factor, degrees_of_freedom(chains, draws, moments.centering))
    alive = at[own.variance > 0]
    i, j = (alive[part] for part in torch.triu_indices(len(alive), len(alive), 1, device="cpu"))
    whole = torch.zeros(count, count, dtype=torch.float64, device="cpu")
    whole[alive.unsqueeze(1), alive] = blocks.gather(alive, alive).double()
    (covariance, long_k), (correlation, long_r) = (
        [each.double() for each in both_spreads(blocks, own, alive, alive, kind)] for kind in (False, True)
    )
    place = torch.zeros(count, dtype=torch.int64, device="cpu")
    place[alive] = torch.arange(len(alive), device="cpu")
    std = own.variance.sqrt() / own.scale
    r = (whole / (std.unsqueeze(1) * std).clamp(min=TINY)).clamp(-1.0, 1.0)
    scales = own.scale[i] * own.scale[j]

    def fit(first: Tensor, second: Tensor, exact: Tensor, long: Tensor, usual: Tensor) -> Fit:
        return _fit(_features(own, first, second, r[first, second]), exact, long, usual)

    of_pairs, of_own = (place[i], place[j]), (place[alive], place[alive])
    usual = (lag1_error(own, i, j, whole[i, j]), lag1_error(own, alive, alive, whole.diagonal()[alive]))
    size = own.scale[alive].square()
    return WatchedErrors(
        watched.index,
        blocks,
        own,
        moments,
        pairs=fit(i, j, covariance[of_pairs] / scales, long_k[of_pairs] / scales, usual[0]),
        own=fit(alive, alive, covariance[of_own] / size, long_k[of_own] / size, usual[1]),
        correlations=fit(
            i, j, correlation[of_pairs], long_r[of_pairs], lag1_error(own, i, j, r[i, j], correlation=True)
        ),
    )


def _features(moments: Moments, rows: Tensor, columns: Tensor, r: Tensor) -> Tensor:
    """[..., f] float64, the same for (i, j) and (j, i)."""
    std = moments.variance.sqrt()
    size = (std / (moments.mean.abs() + std).clamp(min=TINY)).clamp(min=1e-6).log()
    lag1 = moments.lag1.clamp(-0.99, 0.99)
    between = moments.chain_mean.var(dim=0, correction=0) * moments.num_draws / moments.variance.clamp(min=TINY)
    slow = between.clamp(max=1e12).log1p()
    found = [lag1[rows] * lag1[columns], r.square(), r.abs()]
    for each in (lag1, size, slow):
        found += [each[rows] + each[columns], each[rows] * each[columns]]
    return torch.stack(torch.broadcast_tensors(*found), dim=-1)


def _fit(features: Tensor, exact: Tensor, long: Tensor, usual: Tensor) -> Fit:
    """By ridge regression.

    Args:
        features: [p, f] of p pairs; the rest is [p].
        exact, long: errors from the draws' products, plain and as intervals.
        usual: of the lag-1 formula.
    """
    usable = (exact > 0) & (usual > 0) & torch.isfinite(exact) & torch.isfinite(usual)
    x, y = features[usable], (exact[usable] / usual[usable]).log()
    count = features.shape[-1]
    zero = torch.zeros(count, dtype=torch.float64, device="cpu")
    if not len(y):
        return Fit(zero, zero + 1, zero, 0.0)
    center, spread = x.mean(dim=0), x.std(dim=0, correction=0)
    spread = torch.where(spread > 1e-9, spread, 1.0)
    slope = zero
    if len(y) >= FEWEST:
        z = ((x - center) / spread).clamp(-3.0, 3.0)
        z = z - z.mean(dim=0)
        gram = z.T @ z + RIDGE * len(y) * torch.eye(count, dtype=torch.float64, device="cpu")
        slope = torch.linalg.solve(gram, z.T @ (y - y.mean()))
    left = y - Fit(center, spread, slope, 0.0).ratio(x).log()
    reach = (long[usable] / exact[usable]).log().clamp(min=0.0).mean()
    alone = left.var(correction=0) / (SCATTER * reach).clamp(min=TINY)
    return Fit(center, spread, slope, float(left.mean() + (1 - alone).clamp(min=0.0) * reach))
