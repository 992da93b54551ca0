"""Tails of null laws: what was drawn, and a generalized Pareto law beyond it (Pickands 1975)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

LEVELS = 256  # at which the drawn part of a tail is kept
EXCEEDING = 400  # different draws that the law beyond is fitted to
MOST_SHAPE = 0.5
SHAPE_ERROR = 0.03  # about that of a shape fitted to 400 exceedances: a smaller one is no sign of a heavy tail
MARGIN = 1.2  # on the scale of that law: draws share traces, so 400 exceedances tell it to 10 % or 20 %


@dataclass(frozen=True)
class Tails:
    """Some laws of a coordinate g > 0: survival, log-linear between levels, and beyond the last level.

    Beyond it the survival is that of the last level times (1 + shape (g - last) / scale)^(-1 / shape). The shape is
    never below 0: a law that ends or falls faster than an exponential one is taken for exponential. To that of a heavy
    tail 1 / n is added, n the rows whose draws reach there, as the mean of n draws tells a law no better. That and a
    margin on the scale over-state chance there rather than under-state it, the more the fewer draws there are.
    """

    level: np.ndarray  # [LEVELS] ascending g, one row a law: [laws, LEVELS]
    log_share: np.ndarray  # [laws, LEVELS] descending: log of the share above the level
    scale: np.ndarray  # [laws]
    shape: np.ndarray  # [laws], at least 0

    @classmethod
    def of(cls, drawn: Iterable[np.ndarray]) -> Tails:
        """Of the draws [rows, ...] of each law, one law after the other."""
        laws = [_fit(g) for g in drawn]
        level, log_share, scale, shape = (np.stack([law[i] for law in laws]) for i in range(4))
        return cls(level, log_share, scale, shape)

    def survival(self, which: np.ndarray, g: np.ndarray) -> np.ndarray:
        """The share above g, for laws that broadcast against g."""
        which = np.broadcast_to(which, g.shape)
        out = np.empty(g.shape, dtype=np.float64)
        for law in np.unique(which):
            here = which == law
            out[here] = np.exp(self._log_survival(law, g[here]))
        return out

    def _log_survival(self, law: int, g: np.ndarray) -> np.ndarray:
        last, shape = self.level[law, -1], self.shape[law]
        inside = np.interp(g, self.level[law], self.log_share[law])
        over = np.maximum(g - last, 0.0) / self.scale[law]
        beyond = np.log1p(shape * over) / shape if shape > 0 else over
        return inside - beyond

    def quantile(self, which: np.ndarray, share: float) -> np.ndarray:
        """g above which that share lies, of each law asked for: [r] float64."""
        log = np.log(share)
        each = np.empty(len(self.scale))
        for law in range(len(each)):
            beyond = max(self.log_share[law, -1] - log, 0.0)
            shape = self.shape[law]
            inside = np.interp(-log, -self.log_share[law], self.level[law])
            each[law] = inside + self.scale[law] * (np.expm1(shape * beyond) / shape if shape > 0 else beyond)
        return each[which]


def coordinate(correlation: np.ndarray, freedom: np.ndarray) -> np.ndarray:
    """g = -(D - 2) / 2 log(1 - R^2), 0 for R below 0: for normal losses about -log of the share above R."""
    g = np.maximum(correlation, 0.0, dtype=np.float64)
    np.square(g, out=g)
    np.subtract(1.0, g, out=g)
    np.log(np.maximum(g, 1e-12, out=g), out=g)
    return np.multiply(g, -0.5 * np.asarray(freedom), out=g)


def _fit(g: np.ndarray) -> tuple[np.ndarray, np.ndarray, float, float]:
    drawn = np.sort(g, axis=None)[::-1].astype(np.float64)
    total = len(drawn)
    most = max(total // 20, 1)
    distinct = np.flatnonzero(np.diff(drawn[: most + 1]))  # of some pairs one draw stands for several
    top = int(distinct[EXCEEDING - 1]) + 1 if len(distinct) >= EXCEEDING else most
    ranks = np.unique(np.geomspace(top, max(int((drawn > 0).sum()), top + 1), LEVELS).astype(np.int64))[::-1]
    ranks = np.minimum(ranks, total - 1)
    level, log_share = drawn[ranks], np.log(ranks / total)
    excess = drawn[:top] - drawn[top]
    scale, shape = _pareto(excess)
    if shape > 0:
        shape += 1 / int((g > drawn[top]).reshape(len(g), -1).any(axis=1).sum())
    pad = LEVELS + 1 - len(ranks)
    return np.pad(level, (pad, 0), mode="edge"), np.pad(log_share, (pad, 0), mode="edge"), scale, shape


def _pareto(excess: np.ndarray) -> tuple[float, float]:
    """Scale and shape by probability-weighted moments (Hosking and Wallis 1987), of excesses in descending order."""
    n, mean = len(excess), float(excess.mean())
    weighted = float((excess * (np.arange(n) + 0.5) / n).mean())  # E[x (1 - F(x))]
    if mean <= 0 or mean - 2 * weighted <= 0:
        return MARGIN * max(mean, 1e-6), 0.0
    shape = min(max(2 - mean / (mean - 2 * weighted) - SHAPE_ERROR, 0.0), MOST_SHAPE)
    return MARGIN * mean * (1 - shape), shape
