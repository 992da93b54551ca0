"""Panels: k draws of one chain, as [k, N] losses, from the chain and the probe.  Running statistics over panels."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lossk.probe.evaluation import Evaluation
from lossk.probe.probe import Probe
from lossk.samplers.chain import Chain, ChainState, Draw
from lossk.timings import Progress, Timings

PANEL_BYTES = 128 * 2**20


@dataclass(frozen=True)
class Panel:
    """Some consecutive draws of one chain."""

    chain: int
    first_draw: int
    losses: Tensor  # [k, N] float32, nats; valid until the next panel is asked for
    draws: list[Draw]  # [k] what the chain says of them
    state: ChainState  # after the last draw

    def on_host(self) -> Panel:
        """The same with its losses in host memory."""
        return self if self.losses.device.type == "cpu" else dataclasses.replace(self, losses=self.losses.cpu())


def choose_panel(num_samples: int, num_draws: int, memory: int | None = None) -> int:
    """Draws per rank-k update: all of a chain's if they fit in 128 MiB, else what does, but at least 16.

    Args:
        memory: bytes of an explicit budget; a panel, with all that is made of it, is kept to an eighth.
    """
    fitting = PANEL_BYTES // (4 * num_samples)
    panel = max(16, min(fitting, 512))
    if memory is not None:
        per_draw = 12 * num_samples + 40 * min(num_samples, 4096)  # `lossk.plan.layout.panel_bytes`
        panel = max(1, min(panel, memory // 8 // per_draw))
    return min(num_draws, panel)


def chain_panels(
    chain: Chain,
    probe: Probe,
    *,
    panel: int,
    num_draws: int,
    timings: Timings,
    progress: Progress,
    start: ChainState | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[Panel]:
    """Run one chain and yield its draws a panel at a time (the last one may be shorter).

    Args:
        device: where the panel is held.
    """
    buffer = torch.empty(panel, len(probe), dtype=torch.float32, device=device)
    evaluation = Evaluation(chain, probe, panel, timings)
    draws: list[Draw] = []
    first = 0  # of the draws that are not evaluated yet
    for draw in chain.run(num_draws, start):
        progress.update()
        if draw is None:
            continue
        draws.append(draw)
        enough = evaluation.keep(draw)
        full = len(draws) == panel or draw.draw + 1 == num_draws
        if enough or full:
            evaluation.start(buffer[first : len(draws)])
            first = len(draws)
        if full:
            evaluation.finish()
            yield Panel(draw.chain, draw.draw + 1 - len(draws), buffer[: len(draws)], draws, chain.state())
            draws, first = [], 0


class ChainStatistics:
    """Running mean, squared deviations, lag-1 products and likelihood of each sample over one chain, in float64.

    The lag-1 products are taken about the chain's first draw and moved to its mean at the end:
    sum (x_t - m)(x_{t+1} - m) = S - (m - c)(A + B) + (T-1)(m - c)^2, with c the first draw.
    """

    def __init__(self, num_samples: int, device: torch.device | str = "cpu") -> None:
        def zeros(count: int) -> Tensor:
            return torch.zeros(count, dtype=torch.float64, device=device)

        self.count = 0
        self.mean = zeros(num_samples)
        self.m2 = zeros(num_samples)
        self._origin = zeros(0)  # [N] the first draw
        self._last = zeros(0)  # [N] the latest draw, from the origin
        self._products = zeros(num_samples)  # S
        self._sum = zeros(num_samples)  # of all draws, from the origin
        self._likelihood = zeros(num_samples)  # sum of exp(-loss), from the origin

    def add(self, panel: Tensor) -> Tensor:
        """Take in a panel [k, N] float64; returns its centered rows [k+1, N], the last one the step of the mean.

        (P - m_p) and sqrt(t k / (t + k)) (m_p - m): the sum of their outer products is the growth of the co-moment
        matrix (Chan, Golub and LeVeque 1983).
        """
        k, t = len(panel), self.count
        panel_mean = panel.mean(dim=0)
        step = panel_mean - self.mean
        rows = torch.cat([panel - panel_mean, (step * (t * k / (t + k)) ** 0.5).unsqueeze(0)])
        self.m2 += rows.square().sum(dim=0)
        self.mean += step * (k / (t + k))
        self._add_lagged(panel)
        self.count += k
        return rows

    def _add_lagged(self, panel: Tensor) -> None:
        if self.count == 0:
            self._origin = panel[0].clone()
        moved = panel - self._origin
        if self.count > 0:
            self._products += self._last * moved[0]
        self._products += (moved[:-1] * moved[1:]).sum(dim=0)
        self._sum += moved.sum(dim=0)
        self._likelihood += (-moved).exp().sum(dim=0)
        self._last = moved[-1].clone()

    def lag1_products(self) -> Tensor:
        """[N] float64: sum over t of (x_t - m)(x_{t+1} - m)."""
        shift = self.mean - self._origin
        first_and_last = self._sum - self._last + self._sum  # A + B; the first draw is 0 from the origin
        return self._products - shift * first_and_last + (self.count - 1) * shift.square()

    def log_likelihood_sum(self) -> Tensor:
        """[N] float64: log of the sum over draws of exp(-loss)."""
        return self._likelihood.log() - self._origin


class ChainTotals:
    """What the information criteria need of each chain, summed over samples: [C] float64."""

    def __init__(self, num_chains: int, num_draws: int) -> None:
        self.num_draws = num_draws
        # nats^2: the functional variance of each chain
        self.variance = torch.zeros(num_chains, dtype=torch.float64, device="cpu")
        # sum over samples of log E[exp(-loss)]
        self.log_likelihood = torch.zeros(num_chains, dtype=torch.float64, device="cpu")

    def add(self, chain: int, statistics: ChainStatistics) -> None:
        """Take in some samples of a finished chain."""
        self.variance[chain] += statistics.m2.sum().cpu() / (self.num_draws - 1)
        self.log_likelihood[chain] += (statistics.log_likelihood_sum() - math.log(self.num_draws)).sum().cpu()
