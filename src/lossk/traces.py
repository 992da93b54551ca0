"""Loss traces: the losses of every sample at every draw."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


class LossTraces:
    """Losses [chain, draw, sample] float32, nats, from `lossk.sample_losses` or from anywhere.

    Args:
        losses: [C, T, N] tensor or array, finite, T at least 2. Converted to float32.
        excess: [C, T] rise of the training loss over its value at w* at each draw, if known (for the LLC).

    Raises:
        ValueError: another shape, fewer than two draws, or a non-finite entry.
    """

    def __init__(
        self,
        losses: Tensor | np.ndarray,
        *,
        excess: Tensor | None = None,
        n_beta: float | None = None,
        meta: dict[str, Any] | None = None,
    ) -> None:
        losses = torch.as_tensor(losses)
        if losses.ndim != 3 or 0 in losses.shape:
            raise ValueError(f"losses must have shape [chain, draw, sample], got {list(losses.shape)}")
        if losses.shape[1] < 2:
            raise ValueError(f"losses must hold at least 2 draws per chain, got {losses.shape[1]}")
        self.losses = losses.detach().float().cpu()
        bad = (~torch.isfinite(self.losses)).nonzero()
        if bad.numel():
            chain, draw, sample = bad[0].tolist()
            value = float(self.losses[chain, draw, sample])
            raise ValueError(f"losses must be finite; chain {chain}, draw {draw}, sample {sample} is {value}")
        self.excess = excess
        self.n_beta = n_beta
        self.meta = meta or {}

    @property
    def num_chains(self) -> int:
        """C."""
        return self.losses.shape[0]

    @property
    def num_draws(self) -> int:
        """T, per chain."""
        return self.losses.shape[1]

    @property
    def num_samples(self) -> int:
        """N."""
        return self.losses.shape[2]

    def __repr__(self) -> str:
        return f"LossTraces({self.num_chains} chains x {self.num_draws} draws x {self.num_samples} samples)"
