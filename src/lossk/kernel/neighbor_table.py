"""Neighbors as a table: for a terminal, for a notebook, and as columns for a file."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from lossk.forms.names import Names
from lossk.optional import require

if TYPE_CHECKING:
    import pandas as pd

SHOWN_ROWS, SHOWN_NEIGHBORS = 8, 5


class NeighborTable:
    """What is shown of neighbors [r, k] of some rows: `index` and `correlation` [r, k], `noise_floor` [r].

    It stands before a named tuple of these, whose fields are unpacked as ever; rows and names are kept beside them.
    """

    index: Any
    correlation: Tensor
    noise_floor: Tensor
    _rows: Tensor | None = None
    _names: Names = Names()

    @property
    def rows(self) -> Tensor:
        """[r] int64, whose neighbors these are."""
        return torch.arange(len(self.index), dtype=torch.int64, device="cpu") if self._rows is None else self._rows

    @property
    def names(self) -> Names:
        """Ids and classes of all rows of the kernel."""
        return self._names

    def of(self, rows: Tensor | None, names: Names) -> Self:
        """The same, as the neighbors of these rows (None: of all, in order), which are called so."""
        found = type(self)(*self)  # type: ignore[misc]
        found._rows, found._names = rows, names
        return found

    def _replace(self, **changed: Any) -> Self:
        """As of any named tuple."""
        return super()._replace(**changed).of(self._rows, self._names)  # type: ignore[misc]

    def columns(self) -> dict[str, np.ndarray]:
        """Columns of r k entries: sample, rank from 1, neighbor (-1: none), and what is known of each pair."""
        found, (count, k) = self._asdict(), self.index.shape  # type: ignore[attr-defined]
        sample, neighbor = self.rows.repeat_interleave(k).numpy(), self.index.reshape(-1).numpy()
        out = {"sample": sample, **self.names.columns("", sample)}
        out |= {"rank": np.tile(np.arange(1, k + 1), count), "neighbor": neighbor}
        out |= self.names.columns("neighbor_", neighbor)
        for name, values in found.items():
            if name == "index" or not isinstance(values, Tensor):
                continue
            out[name] = (values.repeat_interleave(k) if values.ndim == 1 else values.reshape(-1)).numpy()
        return out

    def to_dataframe(self) -> pd.DataFrame:
        """A row for each sample and rank, with ids and labels where the kernel has them. Needs pandas."""
        return require("pandas", "analysis", "a table").DataFrame(self.columns())

    def lines(self, rows: int = SHOWN_ROWS, neighbors: int = SHOWN_NEIGHBORS) -> list[tuple[str, str, str]]:
        """For the first rows: a sample, its noise floor, its nearest with their R; * stands above the floor."""
        out = []
        for i in range(min(rows, len(self.rows))):
            floor, near = float(self.noise_floor[i]), []
            for j in range(min(neighbors, self.index.shape[1])):
                other, value = int(self.index[i, j]), float(self.correlation[i, j])
                if other >= 0:
                    near.append(f"{self.names.row(other)} {value:.3f}{'*' if abs(value) > floor else ''}")
            out.append((self.names.row(int(self.rows[i])), f"{floor:.3f}", ", ".join(near) or "none"))
        return out

    def _title(self) -> str:
        count, k = self.index.shape
        return f"{type(self).__name__} of {count:,} samples, {k} each; * stands above the sample's noise floor"

    def _more(self) -> str:
        hidden = len(self.rows) - SHOWN_ROWS
        return f"... {hidden:,} more samples" if hidden > 0 else ""

    def __repr__(self) -> str:
        lines = [("sample", "floor", "nearest, with R"), *self.lines()]
        first = max(len(line[0]) for line in lines)
        body = [f"{sample:{first}}  {floor:>5}  {near}" for sample, floor, near in lines]
        return "\n".join([self._title(), *body, *filter(None, [self._more()])])

    def _repr_html_(self) -> str:
        left = "style='text-align:left'"
        body = "".join(
            "<tr>" + "".join(f"<td {left}>{escape(cell)}</td>" for cell in line) + "</tr>" for line in self.lines()
        )
        head = "".join(f"<th {left}>{name}</th>" for name in ("sample", "noise floor", "nearest, with R"))
        return f"<p>{escape(self._title())}</p><table><tr>{head}</tr>{body}</table><p>{escape(self._more())}</p>"
