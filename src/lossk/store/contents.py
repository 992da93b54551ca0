"""What a kernel consists of, as data: what a store is written from and read as."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lossk.diagnostics.diagnostics import Diagnostics
from lossk.forms.blocks import Blocks, Moments
from lossk.forms.names import Names
from lossk.forms.watched import Watched


@dataclass(frozen=True, kw_only=True)
class Contents:
    """A finished kernel's parts; `LossKernel` is what its user reads of them."""

    blocks: Blocks  # covariances over scales, as tiles or as a factor
    moments: Moments
    meta: dict[str, Any] = field(default_factory=dict)
    diagnostics: Diagnostics | None = None
    tokens: Tensor | None = None  # [N, 2] int64, (sample, position), of a loss per token
    sets: Mapping[str, slice] = field(default_factory=dict)  # rows of each probe set
    watched: Watched | None = None  # traces kept beside tiles
    names: Names = field(default_factory=Names)  # ids and classes of the rows

    @property
    def dtype(self) -> str:
        """Of the stored tiles or factor: "float32" or "float16"."""
        return str(self.blocks.dtype).removeprefix("torch.")
