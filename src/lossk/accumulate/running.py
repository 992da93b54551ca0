"""Each sample's statistics over a whole run, streamed: all that is known of the samples but how they move together."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lossk.accumulate.panel import ChainStatistics, ChainTotals
from lossk.forms.blocks import Moments, power_of_two_near, tile_spans
from lossk.forms.centering import degrees_of_freedom
from lossk.plan.layout import STRIPE


class RunningMoments:
    """Mean, variance, chain means and lag-1 autocorrelation of every sample, in float64, from panels of losses.

    The same numbers to the bit whether tiles are kept in memory or in a store: neither has a hand in them.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        num_chains: int,
        num_draws: int,
        centering: str,
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self.num_samples, self.num_chains, self.num_draws = num_samples, num_chains, num_draws
        self.centering = centering
        self.chain_mean = self._zeros(num_chains, num_samples)
        self.m2 = self._zeros(num_samples)  # of the closed chains
        self.lag1 = self._zeros(num_samples)
        self.totals = ChainTotals(num_chains, num_draws)
        self.stripes = tile_spans(num_samples, STRIPE)
        self._open: dict[int, list[ChainStatistics]] = {}
        self._closed = 0  # chains summed up

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=self.device)

    def add(self, chain: int, panel: Tensor) -> Iterator[tuple[slice, Tensor, ChainStatistics]]:
        """Take in the next draws of a chain, stripe by stripe; chains may come one after the other, or side by side.

        Args:
            panel: [k, N] float32, losses in nats.

        Yields:
            (columns, their centered rows [k+1, s] float64, the chain's statistics of them so far).
        """
        assert panel.ndim == 2
        assert panel.shape[1] == self.num_samples
        if chain not in self._open:
            self._open[chain] = [ChainStatistics(s.stop - s.start, self.device) for s in self.stripes]
        for span, statistics in zip(self.stripes, self._open[chain], strict=True):
            yield span, statistics.add(panel[:, span].double()), statistics
        self._close_chains()

    def _close_chains(self) -> None:
        """Sum up finished chains in the order of their numbers, so that sums do not depend on which came first."""
        while self._closed in self._open and self._open[self._closed][0].count == self.num_draws:
            chain, stripes = self._closed, self._open.pop(self._closed)
            for span, statistics in zip(self.stripes, stripes, strict=True):
                assert statistics.count == self.num_draws
                self.chain_mean[chain, span] = statistics.mean
                self.m2[span] += statistics.m2
                self.lag1[span] += statistics.lag1_products()
                self.totals.add(chain, statistics)
            self._closed += 1

    @property
    def freedom(self) -> int:
        """What a sum of products is divided by: the draws less one, of each chain or of all."""
        return degrees_of_freedom(self.num_chains, self.num_draws, self.centering)

    def between(self) -> Tensor:
        """[C, N] float64: rows whose products are what the spread of the chain means adds under pooled centering."""
        return (self.chain_mean - self.chain_mean.mean(dim=0)) * self.num_draws**0.5

    def finish(self) -> Moments:
        """The moments of the whole run."""
        assert self._closed == self.num_chains
        within = self.m2
        lag1 = torch.where(within > 0, self.lag1 / within.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
        total = within
        if self.centering == "pooled":
            total = within + self.between().square().sum(dim=0)
        variance = total / self.freedom
        return Moments(
            mean=self.chain_mean.mean(dim=0).cpu(),
            variance=variance.cpu(),
            scale=torch.where(variance > 0, power_of_two_near(variance.sqrt()), 1.0).cpu(),
            chain_mean=self.chain_mean.cpu(),
            lag1=lag1.cpu(),
            num_chains=self.num_chains,
            num_draws=self.num_draws,
            centering=self.centering,
        )


class MomentsFirst:
    """While draws are sampled only the moments are kept; a subclass's `finalize` makes the rest from the draws kept."""

    def __init__(
        self, num_samples: int, tile: int, *, num_chains: int, num_draws: int, centering: str, dtype: str
    ) -> None:
        self.num_samples, self.tile, self.dtype = num_samples, tile, dtype
        self.running = RunningMoments(num_samples, num_chains=num_chains, num_draws=num_draws, centering=centering)

    @property
    def totals(self) -> ChainTotals:
        """What the information criteria need of each chain."""
        return self.running.totals

    def update(self, chain: int, panel: Tensor) -> None:
        """Take in the next draws of a chain, [k, N] float32, nats."""
        for _ in self.running.add(chain, panel.cpu()):
            pass
