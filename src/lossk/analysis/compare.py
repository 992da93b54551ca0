"""Two kernels of the same samples side by side: entries, alignment, and neighbors gained and lost."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from lossk.analysis.pairs import Kernel, Pairs, as_pairs, blocks, spans_of
from lossk.checks import check_flag, check_integer
from lossk.kernel.neighbors import nearest
from lossk.records import check_record


@dataclass(frozen=True)
class Comparison:
    """How alike two kernels are. Samples dead in either are left out, of everything."""

    num_samples: int  # live in both
    entry_correlation_k: float  # Pearson, of the entries above the diagonal
    entry_correlation_r: float
    cka_k: float  # centered kernel alignment (Cortes et al. 2012, Kornblith et al. 2019), diagonals included
    cka_r: float
    debiased_cka_k: float  # of unbiased HSIC (Song et al. 2012), without diagonals: 0 on average if unrelated
    debiased_cka_r: float
    neighbors: int  # k
    overlap: float  # share of a's k nearest neighbors that are among b's
    chance_overlap: float  # k / (n - 1): of random neighbors
    overlaps: Tensor  # [N] float64, per sample; NaN where dead
    gained: Tensor  # [N, k] int64: b's neighbors that are none of a's, nearest first, then -1
    lost: Tensor  # [N, k] int64: a's neighbors that are none of b's

    def __post_init__(self) -> None:
        check_record(self)

    def to_dict(self) -> dict[str, Any]:
        """The numbers that are not per sample."""
        return {key: value for key, value in asdict(self).items() if not isinstance(value, Tensor)}


def compare_kernels(
    a: Kernel | Tensor | np.ndarray,
    b: Kernel | Tensor | np.ndarray,
    *,
    k: int = 10,
    progress: bool = False,
) -> Comparison:
    """Compare two kernels of the same N samples: loss kernels, symmetric [N, N] arrays, or features [N, d].

    Streamed over blocks: two passes over the N^2 / 2 pairs of each (one for the sums, one for the neighbors), a few
    blocks in memory. Both kernels' Monte Carlo noise lowers every number here: two runs of one network do not reach 1.
    The entries of K are led by the few samples of largest variance; those of R count every pair alike.

    Args:
        k: neighbors compared, from 1 to the live samples less 1.

    Raises:
        ValueError: different numbers of samples, or too few live in both.
    """
    k, progress = check_integer("k", k, 1), check_flag("progress", progress)
    one, two = as_pairs("a", a), as_pairs("b", b)
    if one.num_samples != two.num_samples:
        raise ValueError(f"a and b must be of the same samples, got {one.num_samples} and {two.num_samples}")
    live = ~(one.dead | two.dead)
    count = int(live.sum())
    if count < 4 or k >= count:
        raise ValueError(f"a and b must have at least 4 and k + 1 = {k + 1} samples live in both, got {count}")
    sums = {name: _Sums(one.num_samples) for name in ("covariance", "correlation")}
    parts = list(blocks(spans_of(one, two)))
    for rows, columns in tqdm(parts, desc="comparing", unit="tile", disable=not progress):
        for name, into in sums.items():
            x, y = (getattr(pairs, name)(rows, columns) for pairs in (one, two))
            for block in (x, y):
                block[~live[rows]] = 0.0
                block[:, ~live[columns]] = 0.0
            into.add(rows, columns, x, y)
    near = [_neighbors(pairs, live, k) for pairs in (one, two)]
    shared = (near[0].unsqueeze(2) == near[1].unsqueeze(1)) & (near[0] >= 0).unsqueeze(2)  # [N, k, k]
    overlaps = torch.where(live, shared.any(dim=2).double().mean(dim=1), float("nan"))
    of_k, of_r = sums["covariance"], sums["correlation"]
    return Comparison(
        count,
        of_k.entry_correlation(count),
        of_r.entry_correlation(count),
        of_k.cka(count),
        of_r.cka(count),
        of_k.debiased_cka(count),
        of_r.debiased_cka(count),
        k,
        float(overlaps[live].mean()),
        k / (count - 1),
        overlaps,
        _without(near[1], shared.any(dim=1)),
        _without(near[0], shared.any(dim=2)),
    )


class _Sums:
    """Sums over the pairs of two symmetric matrices, from blocks of their upper triangles; float64."""

    def __init__(self, num_samples: int) -> None:
        self.row = torch.zeros(2, num_samples, dtype=torch.float64, device="cpu")  # sums of rows, without the diagonal
        self.diagonal = torch.zeros(2, num_samples, dtype=torch.float64, device="cpu")
        # of entries off the diagonal, both triangles
        self.product = torch.zeros(2, 2, dtype=torch.float64, device="cpu")

    def add(self, rows: slice, columns: slice, x: Tensor, y: Tensor) -> None:
        """Blocks [r, c], which are changed."""
        both = (x, y)
        for m, block in enumerate(both):
            if rows == columns:
                self.diagonal[m, rows] = block.diagonal()
                block.fill_diagonal_(0.0)
            self.row[m, rows] += block.sum(dim=1)
            if rows != columns:
                self.row[m, columns] += block.sum(dim=0)
        for m in range(2):
            for n in range(2):
                self.product[m, n] += float((both[m] * both[n]).sum()) * (1 if rows == columns else 2)

    def entry_correlation(self, count: int) -> float:
        """Pearson correlation of the entries off the diagonal."""
        pairs = count * (count - 1)
        total = self.row.sum(dim=1)
        return _normalised(self.product - torch.outer(total, total) / pairs)

    def cka(self, count: int) -> float:
        """tr(X H Y H) / sqrt(tr(X H X H) tr(Y H Y H)), H the centering matrix."""
        row = self.row + self.diagonal
        total = row.sum(dim=1)
        product = self.product + self.diagonal @ self.diagonal.T
        return _normalised(product - 2 * row @ row.T / count + torch.outer(total, total) / count**2)

    def debiased_cka(self, count: int) -> float:
        """The same ratio of unbiased HSIC; NaN where either estimate of its own HSIC is not positive."""
        total = self.row.sum(dim=1)
        hsic = self.product + torch.outer(total, total) / ((count - 1) * (count - 2))
        return _normalised(hsic - 2 * self.row @ self.row.T / (count - 2))


def _normalised(products: Tensor) -> float:
    """products[0, 1] / sqrt(products[0, 0] products[1, 1]); NaN where nothing varies."""
    if not (products[0, 0] > 0 and products[1, 1] > 0):
        return float("nan")
    # Roots one by one: the product of two sums of squares may underflow.
    return float(products[0, 1]) / (float(products[0, 0]) ** 0.5 * float(products[1, 1]) ** 0.5)


def _neighbors(pairs: Pairs, live: Tensor, k: int) -> Tensor:
    """[N, k] the nearest live others of each live sample, -1 elsewhere."""
    spans = spans_of(pairs)

    def tile(i: int, j: int) -> Tensor:
        return pairs.correlation(spans[i], spans[j]).float()

    return nearest(tile, ~live, spans[0].stop - spans[0].start, k).index


def _without(index: Tensor, left_out: Tensor) -> Tensor:
    """The entries of each row [N, k] that are not left out, moved to the front; -1 behind them."""
    gone = left_out | (index < 0)
    order = gone.long().argsort(dim=1, stable=True)
    return index.masked_fill(gone, -1).gather(1, order)
