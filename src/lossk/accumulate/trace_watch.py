"""What the diagnostics keep of a run while it is made."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lossk.forms.centering import row_means
from lossk.forms.watched import Watched, watched_samples
from lossk.samplers.chain import Draw


class TraceWatch:
    """What the diagnostics keep of a run: [C, T] mean losses and rises, and the traces of a few samples."""

    def __init__(self, num_chains: int, num_draws: int, num_samples: int) -> None:
        self.index = watched_samples(num_samples, num_chains * num_draws)  # [w]
        self.mean_loss = _unknown(num_chains, num_draws)  # nats
        self.excess = _unknown(num_chains, num_draws)  # nats
        self.distance = _unknown(num_chains, num_draws)  # |w - w*|
        self.acceptance = _unknown(num_chains, num_draws)  # of a Metropolis test
        self.curvature = _unknown(num_chains)  # h_max at the chains' last draws
        self.variance = _unknown(num_chains)  # of gradients there
        self.glances = _unknown(num_chains, num_draws)  # of the curvature over few samples
        self.losses = _unknown(num_chains, num_draws, len(self.index)).float()  # nats

    def note(self, losses: Tensor, draws: Sequence[Draw]) -> None:
        """Take what is wanted of a panel [k, N] of consecutive draws of one chain."""
        chain, rows = draws[0].chain, slice(draws[0].draw, draws[0].draw + len(draws))
        self.mean_loss[chain, rows] = row_means(losses)
        self.excess[chain, rows] = self.excess.new_tensor([draw.excess_loss for draw in draws])
        self.distance[chain, rows] = self.distance.new_tensor([draw.distance for draw in draws])
        self.acceptance[chain, rows] = self.acceptance.new_tensor([draw.acceptance for draw in draws])
        self.glances[chain, rows] = self.glances.new_tensor([draw.glance for draw in draws])
        if math.isfinite(draws[-1].curvature):
            self.curvature[chain], self.variance[chain] = draws[-1].curvature, draws[-1].variance
        self.losses[chain, rows] = losses[:, self.index]

    @property
    def watched(self) -> Watched:
        """What a kernel keeps of them."""
        return Watched(self.index, self.losses)


def _unknown(*shape: int) -> Tensor:
    return torch.full(shape, torch.nan, dtype=torch.float64, device="cpu")
