"""Kernels of loss traces against a reference: how alike, how reliable, and from which draw on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GRID = 1.4  # from one number of draws looked at to the next
FINE = 0.02  # of the draws: how closely the first sufficient number is searched for
MEASURES = ("R", "K")


@dataclass(frozen=True)
class Entries:
    """The entries above the diagonal of a covariance and of a correlation kernel: [N (N - 1) / 2] each."""

    covariance: Tensor  # float64, nats^2
    correlation: Tensor  # float32

    def likeness(self, other: Entries) -> dict[str, float]:
        """Pearson's correlation of the entries of R, and of those of K, with another kernel's."""
        return {
            "R": pearson(self.correlation, other.correlation),
            "K": pearson(self.covariance, other.covariance),
        }


@dataclass(frozen=True)
class Passage:
    """When a running kernel first is as alike the reference as asked."""

    draws: int | None  # per chain; None: not within those there are
    curve: list[tuple[int, float]]  # (draws per chain, likeness), ascending

    @property
    def last(self) -> float:
        """The likeness at the most draws looked at."""
        return self.curve[-1][1]


def entries(losses: Tensor, centering: str = "chain") -> Entries:
    """Of traces [C, T, N]: each chain about its own mean ("chain"), or all about one ("pooled")."""
    return entries_by_centering(losses, (centering,))[centering]


def entries_by_centering(losses: Tensor, centerings: Sequence[str]) -> dict[str, Entries]:
    """The same for several centerings, by one product.

    Samples are scaled to unit deviation before the product, whose float32 then serves losses of any size. Pooling adds
    the term between the chains' means (rank C - 1). A sample without variance has correlation 0.
    """
    chains, draws, count = losses.shape
    means = losses.double().mean(dim=1)  # [C, N]
    x = losses - means.unsqueeze(1)
    between = (means - means.mean(dim=0)) * draws**0.5
    scale = (x.square().sum(dim=(0, 1)) + between.square().sum(dim=0)).sqrt()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    z, between = (x.flatten(0, 1) / scale).float(), (between / scale).float()
    within = z.T @ z
    rows, columns = torch.triu_indices(count, count, 1)
    out = {}
    for centering in centerings:
        pooled = centering == "pooled"
        products = within + between.T @ between if pooled else within
        variance = products.diagonal().double()
        deviation = variance.sqrt()
        inverse = torch.where(deviation > 0, 1 / deviation, 0.0)
        freedom = chains * draws - 1 if pooled else chains * (draws - 1)
        above = products[rows, columns]
        out[centering] = Entries(
            covariance=above.double() * scale[rows] * scale[columns] / freedom,
            correlation=above * inverse.float()[rows] * inverse.float()[columns],
        )
    return out


def pearson(a: Tensor, b: Tensor) -> float:
    """Correlation of two vectors; NaN when either is constant or not finite."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    norm = float(a.norm() * b.norm())
    return float(a @ b) / norm if norm > 0 else math.nan


def reliability(losses: Tensor) -> dict[str, float]:
    """Of a kernel of all chains: from its halves, every other chain, stepped up by Spearman and Brown's 2 r / (1 + r).

    The truth itself is expected to show the likeness sqrt(reliability) with such a kernel.
    """
    if len(losses) < 2:
        raise ValueError(f"losses must hold at least 2 chains, got {len(losses)}")
    halves = entries(losses[0::2]).likeness(entries(losses[1::2]))
    return {measure: 2 * r / (1 + r) for measure, r in halves.items()}


class Running:
    """The likeness to a reference of the kernel of each chain's first d draws, less the first `discard` d of them.

    With several centerings the better one counts, separately for every number of draws.
    """

    def __init__(
        self, losses: Tensor, reference: Entries, *, discard: float = 0.0, centerings: Sequence[str] = ("chain",)
    ) -> None:
        self.losses, self.reference = losses, reference
        self.discard, self.centerings = discard, centerings
        self._known: dict[int, dict[str, float]] = {}

    def kept_from(self, draws: int) -> int:
        """The first draw that counts, of `draws`."""
        return math.floor(self.discard * draws)

    def at(self, draws: int) -> dict[str, float]:
        """Likeness by measure ("R", "K") after `draws` draws per chain."""
        if draws not in self._known:
            kernels = entries_by_centering(self.losses[:, self.kept_from(draws) : draws], self.centerings)
            found = [kernel.likeness(self.reference) for kernel in kernels.values()]
            self._known[draws] = {measure: max(one[measure] for one in found) for measure in MEASURES}
        return self._known[draws]

    def passage(self, measure: str, level: float) -> Passage:
        """When the likeness first reaches `level`."""
        return first_passage(lambda draws: self.at(draws)[measure], self.losses.shape[1], level)


def first_passage(score: Callable[[int], float], most: int, level: float, least: int = 4) -> Passage:
    """The fewest draws at which `score(draws)` is at least `level`: on a grid upwards, then bisected to 2 %.

    A score that is not a number reaches nothing.
    """
    if least > most:
        raise ValueError(f"most must be at least {least} draws, got {most}")
    curve: dict[int, float] = {}

    def reached(draws: int) -> bool:
        curve[draws] = score(draws)
        return curve[draws] >= level

    low, high = least - 1, least
    while not reached(high):
        if high == most:
            return Passage(None, sorted(curve.items()))
        low, high = high, min(max(high + 1, math.ceil(high * GRID)), most)
    while low >= least and high - low > max(1, round(FINE * high)):
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return Passage(high, sorted(curve.items()))


def draws_needed(draws: int, likeness: float, level: float) -> float:
    """Draws at which `level` is to be expected, when noise is all that keeps `draws` of them at `likeness`.

    The squared correlation with the truth is S / (S + V / draws).
    """
    if not likeness > 0:
        return math.inf
    odds = {value: value**2 / (1 - value**2) for value in (level, min(likeness, 1 - 1e-9))}
    return draws * odds[level] / odds[min(likeness, 1 - 1e-9)]
