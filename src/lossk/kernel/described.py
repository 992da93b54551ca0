"""What a kernel is: its sizes, its form, and the moments of each row."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lossk.forms.blocks import Blocks, Moments
from lossk.forms.names import Names


class Described:
    """The read-only properties of a kernel, from the parts that it holds."""

    _blocks: Blocks
    _moments: Moments
    _tokens: Tensor | None
    _sets: dict[str, slice]
    _names: Names

    @property
    def num_samples(self) -> int:
        """N, the rows: probe samples or, of a loss per token, their unmasked tokens."""
        return self._blocks.num_samples

    @property
    def tokens(self) -> Tensor | None:
        """[N, 2] int64: (sample, position) of each row of a loss per token; None of a loss per sample.

        The sample's number is that within its own set, where the probe was several.
        """
        return self._tokens

    @property
    def sets(self) -> dict[str, slice]:
        """The rows of each probe set of a `ProbeSets`, in order; empty for a single probe."""
        return dict(self._sets)

    @property
    def num_draws(self) -> int:
        """Draws per chain."""
        return self._moments.num_draws

    @property
    def num_chains(self) -> int:
        """Chains."""
        return self._moments.num_chains

    @property
    def tile(self) -> int:
        """Side of a tile, in samples."""
        return self._blocks.tile

    @property
    def dtype(self) -> str:
        """Of the stored tiles or factor: "float32" or "float16"."""
        return str(self._blocks.dtype).removeprefix("torch.")

    @property
    def form(self) -> str:
        """How it is held: "tiles" or "factor"."""
        return self._blocks.kind

    @property
    def centering(self) -> str:
        """ "chain" or "pooled"."""
        return self._moments.centering

    @property
    def variance(self) -> Tensor:
        """[N] float64, nats^2: the diagonal."""
        return self._moments.variance

    @property
    def mean_loss(self) -> Tensor:
        """[N] float64, nats: each sample's loss averaged over all draws."""
        return self._moments.mean

    @property
    def lag1(self) -> Tensor:
        """[N] float64: lag-1 autocorrelation of each sample's losses within chains; 0 where they never vary."""
        return self._moments.lag1

    @property
    def dead(self) -> Tensor:
        """[N] bool: samples whose loss never varied."""
        return self._moments.variance == 0

    @property
    def shape(self) -> tuple[int, int]:
        """(N, N)."""
        return self.num_samples, self.num_samples

    @property
    def unit(self) -> str:
        """What a row is: "samples" or "tokens"."""
        return "samples" if self.tokens is None else "tokens"

    @property
    def names(self) -> Names:
        """Ids and classes of the rows together, as data."""
        return self._names

    @property
    def ids(self) -> np.ndarray | None:
        """[N] int64 or texts: what whoever made the kernel calls its rows; None where nobody said."""
        return self._names.ids

    @property
    def labels(self) -> Tensor | None:
        """[N] int64, class numbers; None where nobody gave any."""
        return None if self._names.labels is None else torch.from_numpy(self._names.labels)

    @property
    def class_names(self) -> list[str]:
        """Of class 0, 1, ...; empty where classes are numbers."""
        return list(self._names.class_names)

    def __repr__(self) -> str:
        unit = self.unit
        sets = f", sets {', '.join(self._sets)}" if self._sets else ""
        return (
            f"LossKernel({self.num_samples} {unit}, {self.num_chains} chains x {self.num_draws} draws, "
            f"{self.form} in {self.dtype}, {int(self.dead.sum())} dead{sets})"
        )
