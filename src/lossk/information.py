"""Watanabe's information criteria of a run, and estimates with their standard errors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Estimate(NamedTuple):
    """A number and its Monte Carlo standard error (NaN where there is one chain only)."""

    value: float
    se: float


@dataclass(frozen=True)
class Criteria:
    """Watanabe's information criteria from per-chain totals; standard errors from the spread of the chains."""

    chain_variance: Tensor  # [C] float64, sum over training samples of Var(loss), nats^2
    chain_log_likelihood: Tensor  # [C] float64, sum over training samples of log E[exp(-loss)]
    mean_loss: Tensor  # [C] float64, L_n averaged over draws, nats
    num_train: int
    n_beta: float

    @property
    def functional_variance(self) -> Estimate:
        return _over_chains(self.chain_variance)

    @property
    def singular_fluctuation(self) -> Estimate:
        return _over_chains(self.chain_variance * self.n_beta / (2 * self.num_train))

    @property
    def waic(self) -> Estimate:
        beta = self.n_beta / self.num_train
        return _over_chains((beta * self.chain_variance - self.chain_log_likelihood) / self.num_train)

    @property
    def wbic(self) -> Estimate | None:
        wanted = self.num_train / math.log(max(self.num_train, 3))
        if not math.isclose(self.n_beta, wanted, rel_tol=1e-6):
            return None
        return _over_chains(self.mean_loss * self.num_train)


def _over_chains(values: Tensor) -> Estimate:
    se = float(values.std()) / len(values) ** 0.5 if len(values) > 1 else math.nan
    return Estimate(float(values.mean()), se)
