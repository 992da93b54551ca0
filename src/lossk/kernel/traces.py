"""Loss traces: the losses of every sample at every draw."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lossk.checks import check_mapping, check_tensor
from lossk.kernel.column_checks import check_excess, check_sets, check_tokens
from lossk.kernel.trace_writer import TraceWriter
from lossk.settings import check_n_beta


class LossTraces:
    """Losses [chain, draw, sample] float32, nats, from `lossk.sample_losses` or from anywhere.

    Args:
        losses: [C, T, N] tensor or array, finite, T at least 2. Converted to float32.
        excess: [C, T] rise of the training loss over its value at w* at each draw, if known (for the LLC).
        tokens: [N, 2] integers, (sample, position) of each column where these are losses of tokens.
        sets: name -> slice of the columns of one of several probe sets.

    Raises:
        TypeError: something that holds no numbers; names the argument.
        ValueError: another shape, fewer than two draws, a non-finite entry, or a set outside the columns.
    """

    def __init__(
        self,
        losses: Tensor | np.ndarray,
        *,
        excess: Tensor | None = None,
        n_beta: float | None = None,
        meta: dict[str, Any] | None = None,
        tokens: Tensor | np.ndarray | None = None,
        sets: Mapping[str, slice] | None = None,
    ) -> None:
        given = check_tensor("losses", losses, of="a real number", finite=False)
        if given.ndim != 3 or 0 in given.shape:
            raise ValueError(f"losses must have shape [chain, draw, sample], got {list(given.shape)}")
        if given.shape[1] < 2:
            raise ValueError(f"losses must hold at least 2 draws per chain, got {given.shape[1]}")
        self.losses = given.float().cpu()
        for chain, draw in itertools.product(*map(range, given.shape[:2])):
            row = self.losses[chain, draw]  # by rows: a check of all at once takes twice their memory
            if not torch.isfinite(row).all():
                sample = int((~torch.isfinite(row)).nonzero()[0])
                value = float(row[sample])
                raise ValueError(f"losses must be finite; chain {chain}, draw {draw}, sample {sample} is {value}")
        self.excess = check_excess(excess, self.num_chains, self.num_draws)
        self.n_beta = check_n_beta(n_beta)
        self.meta = {} if meta is None else check_mapping("meta", meta)
        self.tokens = check_tokens(tokens, self.num_samples)
        self.sets = check_sets(sets, self.num_samples)

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
        """N, the columns: samples or tokens."""
        return self.losses.shape[2]

    def save(self, path: str | Path, *, centering: str = "chain", dtype: str = "float16") -> None:
        """Write them to a store that `lossk.open` reads as their kernel, from disk, and xarray as a dataset.

        Deviations are kept scaled in `dtype`, about 2 bytes per draw and sample in float16, with relative error 2^-11
        (`lossk.kernel.trace_writer`); means, variances and scales exactly. loss = center + scale * factor, where the
        center is the sample's `chain_mean` or, centered "pooled", its `mean`.

        Args:
            path: of the store; an existing one is refused.
            centering: "chain" or "pooled", of the kernel.
            dtype: "float16" or "float32".
        """
        with TraceWriter(
            path,
            num_chains=self.num_chains,
            num_draws=self.num_draws,
            num_samples=self.num_samples,
            centering=centering,
            dtype=dtype,
            excess=self.excess,
            n_beta=self.n_beta,
            tokens=self.tokens,
            sets=self.sets,
            meta=self.meta,
        ) as writer:
            writer.append(self.losses)

    def __repr__(self) -> str:
        unit = "samples" if self.tokens is None else "tokens"
        return f"LossTraces({self.num_chains} chains x {self.num_draws} draws x {self.num_samples} {unit})"
