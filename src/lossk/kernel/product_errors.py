"""Errors of a kernel's entries from the draws' own products, whatever the law and the memory of the losses.

An entry of K is the mean of x_i x_j, one of R to first order that of z_i z_j - R_ij (z_i^2 + z_j^2) / 2: the error of
such a mean is `lossk.diagnostics.batch_means`'. Two things are added that it does not see:
* Bias: deviations are about means that are estimated, from each chain's T draws, which takes away the covariance of
  these means, LRV_ij / T with LRV the long-run covariance of the losses; its square is added, less its noise and what
  the degrees of freedom of independent draws restore.
* Skewness: a variance that comes out low has a low error, too. Where R is 1 the error is that of the upper end of an
  interval in log K by half, where R is 0 nothing changes.

That is the size of the estimate's errors. An interval must be longer where few draws make it: `wide` errors are such
that +- 1.96 of them hold 95 %, by the shape of the terms (`lossk.diagnostics.batch_means.reach`), and may be many times
as large.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lossk.diagnostics.batch_means import NORMAL_95, reach, spread_of_mean, widening
from lossk.forms.blocks import FactorBlocks, Moments

TINY = torch.finfo(torch.float64).tiny
ENTRIES = 2**19  # of terms [D, c] at a time
QUARTERS = 4  # batches per chain that covariances of means are taken from
FEW = 8  # degrees of freedom, below which an error is at least that of independent normal losses, with Student's t


@dataclass(frozen=True)
class Samples:
    """Some samples' centered traces and what their errors need of each."""

    traces: Tensor  # [D, n] float32, in units of the scale
    variance: Tensor  # [n] float64, of these
    means: Tensor  # [b, n] float64: of the raw traces over parts of chains, less the overall mean
    stretch: Tensor  # [n] float64: root of the long-run variance over what the parts' means have


def product_spread(
    blocks: FactorBlocks, moments: Moments, rows: Tensor, columns: Tensor, correlation: bool, *, wide: bool = False
) -> Tensor:
    """Of a block of a factor's kernel: [r, c] float32, nats^2 or, of correlations, 1."""
    return _spreads(blocks, moments, rows, columns, correlation, (wide,))[0]


def both_spreads(
    blocks: FactorBlocks, moments: Moments, rows: Tensor, columns: Tensor, correlation: bool
) -> tuple[Tensor, Tensor]:
    """The plain errors and the wide ones, in one pass over the products."""
    plain, wide = _spreads(blocks, moments, rows, columns, correlation, (False, True))
    return plain, wide


def _spreads(
    blocks: FactorBlocks, moments: Moments, rows: Tensor, columns: Tensor, correlation: bool, wanted: tuple[bool, ...]
) -> list[Tensor]:
    """[r, c] float32 for each of `wanted`: whether wide."""
    if not len(rows) or not len(columns):
        return [torch.zeros(len(rows), len(columns), dtype=torch.float32, device="cpu") for _ in wanted]
    left = _samples(blocks, moments, rows)
    right = left if torch.equal(rows, columns) else _samples(blocks, moments, columns)
    variance, longer = _variances(left, right, moments, blocks.freedom, correlation, any(wanted))
    same, found = rows.unsqueeze(1) == columns, []
    for wide in wanted:
        error = _assembled(left, right, moments, blocks.freedom, variance, correlation, longer if wide else None)
        if correlation:
            found.append(error.masked_fill(same, 0.0).clamp(max=1.0).float())
        else:
            found.append((error * moments.scale[rows].unsqueeze(1) * moments.scale[columns]).float())
    return found


def _samples(blocks: FactorBlocks, moments: Moments, index: Tensor) -> Samples:
    traces = blocks.take(index)  # [D, n] float32
    series = traces.double().unflatten(0, (moments.num_chains, -1))
    if moments.centering == "chain":
        series += ((moments.chain_mean - moments.mean)[:, index] / moments.scale[index]).unsqueeze(1)
    parts = QUARTERS if moments.num_draws >= 2 * QUARTERS else 1
    length = moments.num_draws // parts
    means = series[:, : parts * length].unflatten(1, (parts, length)).mean(dim=2).flatten(0, 1)
    means -= means.mean(dim=0)
    per_chain = means.square().sum(dim=0) / (max(len(means) - 1, 1) * parts)
    found = spread_of_mean(series).variance * moments.num_chains
    stretch = torch.where(per_chain > 0, found / per_chain.clamp(min=TINY), 0.0).sqrt()
    return Samples(traces, traces.double().square().sum(dim=0) / blocks.freedom, means, stretch)


def _variances(
    left: Samples, right: Samples, moments: Moments, freedom: int, correlation: bool, wide: bool
) -> tuple[Tensor, Tensor | None]:
    """Of the means of all pairs' terms, and the reach of intervals: [r, c] float64.

    A sample of the shorter side, and some of the other, at a time. Of a block of the same samples on both sides the
    upper triangle is computed.
    """
    if left.traces.shape[1] > right.traces.shape[1]:
        variance, reaches = _variances(right, left, moments, freedom, correlation, wide)
        return variance.T, None if reaches is None else reaches.T
    a, b = left.traces, right.traces
    if correlation:
        a, b = (
            torch.where(x.variance > 0, x.traces / x.variance.clamp(min=TINY).sqrt(), 0.0).float()
            for x in (left, right)
        )
    width, (draws, count) = max(16, ENTRIES // len(b)), b.shape
    variance, longer = torch.empty(2, a.shape[1], count, dtype=torch.float64, device="cpu")
    squares = b.square() if correlation else b
    for i, one in enumerate(a.T):
        for start in range(i if left is right else 0, count, width):
            span = slice(start, min(start + width, count))
            terms = one.unsqueeze(1) * b[:, span]
            if correlation:
                half = terms.sum(dim=0) / (2 * freedom)
                terms -= half * squares[:, span]
                terms -= half * one.square().unsqueeze(1)
            found = spread_of_mean(terms.unflatten(0, (moments.num_chains, -1)))
            variance[i, span] = found.variance
            if wide:
                longer[i, span] = reach(found)
    if left is right:
        variance, longer = (part.triu() + part.triu(1).T for part in (variance, longer))
    return variance * (draws / freedom) ** 2, longer if wide else None


def _assembled(
    left: Samples,
    right: Samples,
    moments: Moments,
    freedom: int,
    variance: Tensor,
    correlation: bool,
    longer: Tensor | None,
) -> Tensor:
    """The errors [r, c] float64, in units of the scales or of 1, with bias and skewness.

    Args:
        longer: [r, c], the reach of intervals where these are wanted.
    """
    k = left.traces.double().T @ right.traces.double() / freedom
    size = (left.variance.unsqueeze(1) * right.variance).sqrt()  # [r, c]
    alive = size > 0
    safe = size.clamp(min=TINY)
    r = torch.where(alive, k / safe, 0.0).clamp(-1.0, 1.0)
    parts = len(left.means) // moments.num_chains
    lost = left.means.T @ right.means / (max(len(left.means) - 1, 1) * parts)
    lost = lost * left.stretch.unsqueeze(1) * right.stretch - k / moments.num_draws  # long-run covariance over T
    share = [_lost_share(each, moments) for each in (left, right)]
    if moments.centering == "pooled":
        lost, share = lost / moments.num_chains, [each / moments.num_chains for each in share]
    growth = (1 + share[0].clamp(min=0).unsqueeze(1)) * (1 + share[1].clamp(min=0))
    if correlation:
        bias = lost / safe - r / 2 * (share[0].unsqueeze(1) + share[1])
        noise = share[0].unsqueeze(1) * share[1] / max(len(left.means) - 1, 1)
        least = torch.full_like(r, 1 / freedom)
    else:
        variance = variance * (1 + r.abs() * (growth - 1))
        bias, least = lost, (size.square() + k.square()) / freedom
        noise = share[0].unsqueeze(1) * share[1] * size.square() / max(len(left.means) - 1, 1)
    if freedom < FEW:
        variance = torch.maximum(variance, least)
    error = (variance + (bias.square() - noise).clamp(min=0.0)).sqrt()
    if freedom < FEW or longer is not None:
        error = error * widening(freedom)
    if longer is not None:
        error = error * longer
    elif not correlation:
        u = (NORMAL_95 * error / safe).clamp(min=1e-6, max=3.0)
        error = error * (1 + r.square().square() * (torch.expm1(u) / u - 1) / 2)
    return torch.where(alive, error, 0.0)


def _lost_share(samples: Samples, moments: Moments) -> Tensor:
    """[n]: of a variance, what centering by chain takes away beyond what independent draws lose."""
    parts = len(samples.means) // moments.num_chains
    own = samples.means.square().sum(dim=0) / (max(len(samples.means) - 1, 1) * parts) * samples.stretch.square()
    share = own / samples.variance.clamp(min=TINY) - 1 / moments.num_draws
    return torch.where(samples.variance > 0, share, 0.0)
