"""Watanabe's information criteria of a run, and estimates with their standard errors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lossk.checks import check_number
from lossk.diagnostics.batch_means import of_skewness, reach, spread_of_mean, summed_squares, widening

MOST_VARIANCE = 20.0  # of a loss, nats^2, that a bias is foreseen for


class Estimate(NamedTuple):
    """A number and its Monte Carlo standard error (NaN where there is one chain only)."""

    value: float
    se: float

    def interval(self, level: float = 0.95, *, freedom: float = math.inf) -> tuple[float, float]:
        """The ends of the interval that holds the truth with probability `level`; infinite where the error is unknown.

        Args:
            freedom: degrees of Student's t: C - 1 of an error from the spread of C chains.

        Raises:
            ValueError: `level` is no probability between 0 and 1, or `freedom` is not above 0.
        """
        from scipy.special import stdtrit

        if not 0.0 < check_number("level", level) < 1.0:
            raise ValueError(f"level must lie between 0 and 1, got {level}")
        if math.isnan(freedom) or freedom <= 0:
            raise ValueError(f"freedom must be above 0, got {freedom}")
        if math.isnan(self.se):
            return -math.inf, math.inf
        half = float(stdtrit(min(freedom, 1e9), 0.5 + level / 2)) * self.se
        return self.value - half, self.value + half


@dataclass(frozen=True)
class Criteria:
    """Watanabe's information criteria from per-chain totals; standard errors from the spread of the chains."""

    chain_variance: Tensor  # [C] float64, sum over training samples of Var(loss), nats^2
    chain_log_likelihood: Tensor  # [C] float64, sum over training samples of log E[exp(-loss)]
    mean_loss: Tensor  # [C] float64, L_n averaged over draws, nats
    num_train: int
    n_beta: float
    num_draws: int | None = None  # of a chain; None: biases of few draws are not known
    lost: float = 0.0  # sum over samples of what centering by chain takes away of Var(loss), nats^2
    reach: float = 1.0  # what skewness of the variances makes the errors of V, nu and WAIC longer by

    @property
    def functional_variance(self) -> Estimate:
        return _over_chains(self.chain_variance, self.lost, self.reach)

    @property
    def singular_fluctuation(self) -> Estimate:
        share = self.n_beta / (2 * self.num_train)
        return _over_chains(self.chain_variance * share, self.lost * share, self.reach)

    @property
    def waic(self) -> Estimate:
        beta = self.n_beta / self.num_train
        each = min(float(self.chain_variance.mean()) / self.num_train, MOST_VARIANCE)
        of_mean = 0.0 if self.num_draws is None else self.lost + self.num_train * math.expm1(each) / self.num_draws
        bias = of_mean / 2 - beta * self.lost  # log E[exp(-loss)] of few draws is low by half the relative variance of
        # the mean, which of normal losses is exp(Var) - 1 over the draws
        return _over_chains(
            (beta * self.chain_variance - self.chain_log_likelihood) / self.num_train, bias / self.num_train, self.reach
        )

    @property
    def wbic(self) -> Estimate | None:
        wanted = self.num_train / math.log(max(self.num_train, 3))
        if not math.isclose(self.n_beta, wanted, rel_tol=1e-6):
            return None
        return _over_chains(self.mean_loss * self.num_train)


def lost_variance(chain_mean: Tensor, variance: Tensor, num_draws: int) -> float:
    """What centering by chain takes away of the sum of variances, from the chain means [C, N]; 0 of one chain."""
    if len(chain_mean) < 2:
        return 0.0
    return max(float((chain_mean.var(dim=0) - variance / num_draws).sum()), 0.0)


def reach_of_variance(losses: Tensor) -> float:
    """How much longer than Student's t says is an interval of a sum of variances, for its skewness; 1 where unknown.

    Args:
        losses: [C, T, w], of some of the samples.
    """
    if losses.shape[1] < 2 or not torch.isfinite(losses).all():
        return 1.0
    return float(of_skewness(spread_of_mean(summed_squares(losses).unsqueeze(2))))


def _over_chains(values: Tensor, bias: float = 0.0, reach: float = 1.0) -> Estimate:
    """The spread of the chains over sqrt(C), and the bias foreseen, which Student's t need not make longer."""
    count = len(values)
    if count < 2:
        return Estimate(float(values.mean()), math.nan)
    error = reach * float(values.std()) / count**0.5
    return Estimate(float(values.mean()), math.hypot(error, bias / widening(count - 1)))


def mean_over_draws(trace: Tensor) -> Estimate:
    """The mean of [C, T] draws, by batches of every length (`diagnostics.batch_means`); t is in its error already."""
    series = trace.double()
    if not torch.isfinite(series).all():
        return Estimate(math.nan, math.nan)
    found = spread_of_mean((series - series.mean()).unsqueeze(2))
    error = float(found.variance) ** 0.5 * widening(float(found.batches)) * float(reach(found))
    return Estimate(float(series.mean()), error)
