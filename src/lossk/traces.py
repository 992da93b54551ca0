"""Loss traces: the losses of every sample at every draw."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lossk.checks import check_integer, check_mapping, check_tensor, shown
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
        bad = (~torch.isfinite(self.losses)).nonzero()
        if bad.numel():
            chain, draw, sample = bad[0].tolist()
            value = float(self.losses[chain, draw, sample])
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
        (`lossk.trace_writer`); means, variances and scales exactly. loss = centre + scale * factor, where the centre is
        the sample's `chain_mean` or, centred "pooled", its `mean`.

        Args:
            path: of the store; an existing one is refused.
            centering: "chain" or "pooled", of the kernel.
            dtype: "float16" or "float32".
        """
        from lossk.trace_writer import TraceWriter

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


def check_excess(excess: Any, num_chains: int, num_draws: int) -> Tensor | None:
    """[C, T] rise of the training loss; NaN where a draw's is not known."""
    if excess is None:
        return None
    return check_tensor("excess", excess, (num_chains, num_draws), finite=False).cpu()


def check_tokens(tokens: Any, num_samples: int) -> Tensor | None:
    """[N, 2] int64, (sample, position) of each column."""
    if tokens is None:
        return None
    given = check_tensor("tokens", tokens, of="a real number")
    if list(given.shape) != [num_samples, 2] or given.is_floating_point() or given.dtype == torch.bool:
        raise ValueError(
            f"tokens must be integers of shape [{num_samples}, 2], (sample, position) of each column, "
            f"got {given.dtype} of shape {list(given.shape)}"
        )
    return given.to("cpu", torch.int64)


def check_sets(sets: Any, num_samples: int) -> dict[str, slice]:
    """Slices of the columns by name, their bounds plain integers."""
    if sets is None:
        return {}
    plain = {}
    for name, columns in check_mapping("sets", sets).items():
        if not isinstance(columns, slice) or columns.step is not None:
            raise TypeError(f"sets[{name!r}] must be a slice of the {num_samples} columns, got {shown(columns)}")
        start = check_integer(f"sets[{name!r}].start", columns.start, 0)
        stop = check_integer(f"sets[{name!r}].stop", columns.stop, 0)
        if not start < stop <= num_samples:
            raise ValueError(f"sets: {name!r} must be a slice of the {num_samples} columns, got {columns!r}")
        plain[name] = slice(start, stop)
    return plain
