"""What chance alone shows: the law of the correlations that a row would have with samples unrelated to it.

Losses of different chains are independent. Sample i's trace against sample j's of *another* chain has
therefore the marginals and memories of the real pair and no covariance. A null correlation pairs every chain with
another one, so it has as many draws as a real one. One chain alone is turned around its circle in time.

The null correlations R of a row with random partners are one law of the row, a mixture over its partners, which is what
"the unrelated samples of this row" means. Rows are told apart by the size of their nulls, 1 / mean R^2 = D effective
draws, and by the kurtosis of their nulls; rows alike in kurtosis share the shape of the tail in the coordinate
g = -(D - 2) / 2 log(1 - R^2), which for normal losses is about -log p. Of a row's draws of the null one part gives
D and the kurtosis and another part the tail, so the tail includes what the first part misjudges.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import torch
from torch import Tensor

from lossk.ambient import without_autocast
from lossk.forms.blocks import Blocks, FactorBlocks, Moments
from lossk.forms.centering import center
from lossk.forms.watched import Watched
from lossk.kernel.chance_tail import Tails, coordinate
from lossk.kernel.standard_error import bartlett_factor

PARTNERS = 128  # partners of a row for its size and kurtosis
PAIRINGS = 4  # null correlations of the row with each of these partners
REFERENCE = 1024  # rows whose null correlations make the tails, at most
AGAINST = 640  # partners of these rows
MOST_PAIRINGS = 9  # null correlations of each of these rows and partners, at most
LEAST_SAMPLES, LEAST_DRAWS = 16, 4  # fewer live samples, or draws of a chain, have no law of their own
ALIKE = 96  # rows that share a tail, at least
MOST_TAILS = 10
GROUP = 256  # rows whose nulls are formed at a time: 10 MB of them
SEED = 20

Pairing = tuple[tuple[int, ...], int]  # chain c meets chain order[c], whose draws are turned around by so many


@dataclass(frozen=True)
class RowLaws:
    """The laws of r rows among `others` live samples, by null correlations."""

    tails: Tails
    which: np.ndarray  # [r] int: the tail of each row
    freedom: np.ndarray  # [r] float64: D - 2, at least 1
    others: int

    def floor(self) -> Tensor:
        """[r] float32: where one unrelated sample is expected above."""
        g = self.tails.quantile(self.which, 1.0 / max(self.others, 2))
        return torch.from_numpy(np.sqrt(-np.expm1(-2.0 * g / self.freedom))).float().nan_to_num(1.0)  # of a dead row

    def share_above(self, size: Tensor, index: Tensor) -> Tensor:
        """The share of unrelated samples above each size [r, k]: float64. `index` [r, k] are those of that size."""
        g = coordinate(size.double().numpy(), self.freedom[:, None])
        return torch.from_numpy(self.tails.survival(self.which[:, None], g))


@dataclass(frozen=True)
class LagLaws:
    """The same for jointly normal AR(1) losses, by their lag-1 autocorrelations alone.

    A null correlation has D = n (1 - r_i r_j) / (1 + r_i r_j) effective draws of n = C (T - 1) (Bartlett 1935), and
    R sqrt(D - 2) / sqrt(1 - R^2) is Student's t with D - 2 degrees of freedom. The floor takes r_j at its mean.
    """

    moments: Moments
    rows: Tensor
    alive: Tensor  # [N] bool: the live samples among those meant
    others: int

    def floor(self) -> Tensor:
        from scipy.special import stdtrit  # slow to import

        lag1 = self.moments.lag1.clamp(-0.99, 0.99)
        mean = lag1[self.alive].mean() if self.alive.any() else torch.zeros((), dtype=torch.float64, device="cpu")
        freedom = self._freedom(lag1[self.rows] * mean)
        t = stdtrit(freedom, 1.0 - 1.0 / max(self.others, 2))
        return torch.from_numpy(t / np.sqrt(freedom + np.square(t))).float()

    def share_above(self, size: Tensor, index: Tensor) -> Tensor:
        from scipy.special import stdtr

        lag1 = self.moments.lag1.clamp(-0.99, 0.99)
        freedom = self._freedom(lag1[self.rows].unsqueeze(1) * lag1[index])
        r = size.double().numpy()
        return torch.from_numpy(stdtr(freedom, -r * np.sqrt(freedom / (1 - np.square(r)).clip(1e-15))))

    def _freedom(self, product: Tensor) -> np.ndarray:
        draws = self.moments.num_chains * (self.moments.num_draws - 1)
        return np.maximum((draws / bartlett_factor(product)).numpy() - 2.0, 1e-3)


class Chance:
    """The laws of a kernel's rows, made when they are first asked for.

    Args:
        watched: gives the watched samples' traces, or None.
    """

    def __init__(self, blocks: Blocks | None, moments: Moments, watched: Callable[[], Watched | None]) -> None:
        self._blocks, self._moments, self._watched = blocks, moments, watched
        self._made: dict[bool, _RowsOwn | _Carried | None] = {}

    @property
    def method(self) -> str:
        """What the laws come from: "rows": every row's own draws; "watched": draws of the watched samples, carried to
        rows of like lag-1 autocorrelation; "lag1": no draws (or too few), but a formula."""
        made = self._kept(False)
        return "lag1" if made is None else made.method

    def of(self, rows: Tensor, *, anti: bool = False, among: Tensor | None = None) -> RowLaws | LagLaws:
        """The laws of rows [r] int64, of correlations above 0 (or, `anti`, of -R), among some samples (None: all)."""
        alive = self._moments.variance > 0
        if among is not None:
            alive = torch.zeros_like(alive).index_fill_(0, among, True) & alive
        made = self._kept(anti) if among is None else self._make(alive, anti)
        if made is None:
            return LagLaws(self._moments, rows, alive, int(alive.sum()))
        which, freedom = made.traits(rows)
        return RowLaws(made.tails, which, freedom, int(alive.sum()))

    def _kept(self, anti: bool) -> _RowsOwn | _Carried | None:
        if anti not in self._made:
            self._made[anti] = self._make(self._moments.variance > 0, anti)
        return self._made[anti]

    def _make(self, alive: Tensor, anti: bool) -> _RowsOwn | _Carried | None:
        moments = self._moments
        if moments.num_draws < LEAST_DRAWS or (moments.num_chains == 1 and moments.num_draws < 4 * LEAST_DRAWS):
            return None
        if isinstance(self._blocks, FactorBlocks):
            index = alive.nonzero().squeeze(1)
            return _RowsOwn(self._blocks, moments, index, anti) if len(index) >= LEAST_SAMPLES else None
        if (watched := self._watched()) is None or not watched.losses.isfinite().all():
            return None
        for usable in (alive, moments.variance > 0):  # few of the samples meant: all that are watched
            here = usable[watched.index].nonzero().squeeze(1)
            if len(here) >= LEAST_SAMPLES:
                return _Carried(watched, here, moments, anti)
        return None


class _RowsOwn:
    """Of a factor: size and kurtosis of each row's own nulls."""

    method = "rows"

    def __init__(self, blocks: FactorBlocks, moments: Moments, alive: Tensor, anti: bool) -> None:
        self._blocks, self._chains, self._anti = blocks, moments.num_chains, anti
        rng = np.random.default_rng(SEED)
        reference = _some(rng, alive, REFERENCE)
        partners, against = _partners(rng, alive)
        traces = self._take(reference)
        slow = _slow(traces, moments.num_chains)
        pairings = _pairings(rng, moments, slow)
        # What sorts and scales rows may be any function of their own traces, so turns round the circle serve it.
        turns = rng.permutation(moments.num_draws)[:PAIRINGS].tolist()
        self._pairings = [(pairings[m % len(pairings)][0], turn) for m, turn in enumerate(turns)]
        if moments.num_chains == 1:
            self._pairings = pairings[:PAIRINGS]
        self._partners = self._take(partners)
        size, kurtosis = self._measure(reference)
        self._middle, self._edges = (np.median(size), np.median(kurtosis)), _edges(kurtosis)
        which = np.searchsorted(self._edges, kurtosis, side="right")
        others = self._take(against)
        slow_others, itself = _slow(others, self._chains), reference.unsqueeze(1) == against

        def nulls_of(rows: np.ndarray) -> np.ndarray:
            at = torch.from_numpy(rows)
            torn = slow[at].unsqueeze(1) & slow_others
            nulls = null_correlations(traces[:, at], others, pairings, self._chains, torn)
            nulls[itself[at].numpy()] = 0.0
            return nulls

        self.tails = _tails(which, size, len(self._edges) + 1, nulls_of, anti)

    def _take(self, index: Tensor) -> Tensor:
        return _unit(self._blocks.take(index))

    def _measure(self, rows: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Freedom [r] and kurtosis [r] of the nulls of rows; a dead sample has none, and both are 0."""
        found = np.zeros((2, len(rows)))
        for start in range(0, len(rows), GROUP):
            group = slice(start, start + GROUP)
            nulls = null_correlations(self._take(rows[group]), self._partners, self._pairings, self._chains)
            found[:, group] = _size(nulls, self._anti)
        return found[0], found[1]

    def traits(self, rows: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """The tail [r] int and the freedom [r] of rows; of a dead sample, those of a middling one."""
        freedom, kurtosis = self._measure(rows)
        dead = kurtosis == 0
        freedom, kurtosis = np.where(dead, self._middle[0], freedom), np.where(dead, self._middle[1], kurtosis)
        return np.searchsorted(self._edges, kurtosis, side="right"), freedom


class _Carried:
    """Of tiles: the nulls of watched samples, carried to the rows of like lag-1 autocorrelation."""

    method = "watched"

    def __init__(self, watched: Watched, here: Tensor, moments: Moments, anti: bool) -> None:
        index, self._lag1 = watched.index[here], moments.lag1
        traces = _unit(center(watched.losses[:, :, here], moments.centering).factor.float())
        rng = np.random.default_rng(SEED)
        slow = _slow(traces, moments.num_chains)
        torn = slow.unsqueeze(1) & slow
        nulls = null_correlations(traces, traces, _pairings(rng, moments, slow), moments.num_chains, torn)
        nulls[np.eye(len(index), dtype=bool)] = 0.0
        lag1 = moments.lag1[index].numpy()
        self._edges = _edges(lag1)
        bins = np.searchsorted(self._edges, lag1, side="right")
        sizes = [_size(nulls[bins == b].reshape(1, -1, 1), anti)[0][0] for b in range(len(self._edges) + 1)]
        self._freedom = np.array(sizes)  # of each tail
        self.tails = _tails(bins, self._freedom[bins], len(sizes), nulls.__getitem__, anti)

    def traits(self, rows: Tensor) -> tuple[np.ndarray, np.ndarray]:
        which = np.searchsorted(self._edges, self._lag1[rows].numpy(), side="right")
        return which, self._freedom[which]


def null_correlations(
    rows: Tensor, partners: Tensor, pairings: list[Pairing], num_chains: int, torn: Tensor | None = None
) -> np.ndarray:
    """Correlations of unit traces [C T, r] with those [C T, p] of other chains: [r, p, pairings].

    Args:
        torn: [r, p] bool, the pairs that no turn serves: theirs are those without one.
    """
    inside = partners.unflatten(0, (num_chains, -1))  # [C, T, p]
    out = np.empty((rows.shape[1], partners.shape[1], len(pairings)), dtype=np.float32)
    with without_autocast():
        for m, (order, turn) in enumerate(pairings):
            met = inside[list(order)]
            found = rows.T @ met.roll(turn, 1).flatten(0, 1)
            if torn is not None and turn and num_chains > 1:
                found = torch.where(torn, rows.T @ met.flatten(0, 1), found)
            out[:, :, m] = found.numpy()
    return out


def _pairings(rng: np.random.Generator, moments: Moments, slow: Tensor) -> list[Pairing]:
    """Orders of chains that leave none in its place, at most 9; of one chain, turns by a quarter or more.

    Two or three chains have few orders. Turns add to them where one of a pair has a short memory: to turn a path
    against another is to turn the other, and one that forgets has no ends that must not meet. Two slow paths would be
    torn and show too small correlations.
    """
    chains, draws = moments.num_chains, moments.num_draws
    if chains == 1:
        turns = np.arange(draws // 4, draws - draws // 4)
        return [((0,), int(turn)) for turn in rng.permutation(turns)[:MOST_PAIRINGS]]
    if chains <= 4:
        every = [order for order in permutations(range(chains)) if all(i != c for i, c in enumerate(order))]
        orders = [every[i] for i in rng.permutation(len(every))]
    else:
        found: dict[tuple[int, ...], None] = {}
        while len(found) < MOST_PAIRINGS:
            order = tuple(rng.permutation(chains).tolist())
            if all(i != c for i, c in enumerate(order)):
                found[order] = None
        orders = list(found)
    if len(orders) >= MOST_PAIRINGS or float(slow.float().mean()) > 0.95:
        return [(order, 0) for order in orders]
    turns = rng.permutation(draws)[: MOST_PAIRINGS // len(orders)]
    return [(order, int(turn)) for order in orders for turn in turns]


def _slow(traces: Tensor, num_chains: int) -> Tensor:
    """[r] bool: which unit traces [C T, r] have memory left, beyond noise, after a sixteenth of a chain."""
    inside = traces.unflatten(0, (num_chains, -1))
    lag = inside.shape[1] // 16
    if not lag:
        return torch.ones(traces.shape[1], dtype=torch.bool, device="cpu")
    left = (inside[:, lag:] * inside[:, :-lag]).sum(dim=(0, 1)).abs()
    return left > 0.05 + 3.0 / len(traces) ** 0.5


def _partners(rng: np.random.Generator, index: Tensor) -> tuple[Tensor, Tensor]:
    """Samples for the sizes of rows, and others for the tails."""
    mixed = torch.from_numpy(rng.permutation(len(index)))
    few = min(PARTNERS, len(index) // 2)
    return index[mixed[:few].sort().values], index[mixed[few : few + AGAINST].sort().values]


def _some(rng: np.random.Generator, index: Tensor, most: int) -> Tensor:
    return index[torch.from_numpy(np.sort(rng.permutation(len(index))[:most]))]


def _unit(traces: Tensor) -> Tensor:
    return traces / torch.linalg.vector_norm(traces, dim=0, dtype=torch.float64).clamp(min=1e-300).float()


def _size(nulls: np.ndarray, anti: bool) -> tuple[np.ndarray, np.ndarray]:
    """Freedom D - 2 [r] and kurtosis [r] of nulls [r, p, m], from the side that is meant.

    Freedom is rounded to 1 %: roundings of a product then leave floors alone.
    """
    side = np.maximum(-nulls if anti else nulls, 0.0, dtype=np.float64).reshape(len(nulls), -1)
    count = np.maximum((side > 0).sum(axis=1), 1)
    square = np.square(side)
    second = np.maximum(square.sum(axis=1) / count, 1e-12)
    kurtosis = np.square(square).sum(axis=1) / count / np.square(second)
    freedom = np.maximum(1.0 / second - 2.0, 1.0)
    return np.exp2(np.round(np.log2(freedom) * 64) / 64), kurtosis


def _tails(
    which: np.ndarray, freedom: np.ndarray, laws: int, nulls_of: Callable[[np.ndarray], np.ndarray], anti: bool
) -> Tails:
    """A tail for each law, of the nulls of its rows.

    Args:
        which: [r] int, the law of each row.
        freedom: [r] float64, of each row.
        nulls_of: rows [s] -> their null correlations [s, p, m].
    """

    def drawn(law: int) -> np.ndarray:
        rows = _rows_of(which, law)
        nulls = nulls_of(rows)
        return coordinate(-nulls if anti else nulls, freedom[rows, None, None])

    return Tails.of(drawn(law) for law in range(laws))


def _rows_of(which: np.ndarray, law: int) -> np.ndarray:
    """The rows of a law; of one without rows, as many of all as a law has."""
    rows = np.flatnonzero(which == law)
    return rows if len(rows) else np.arange(len(which))[:: -(-len(which) // (2 * ALIKE))]


def _edges(values: np.ndarray) -> np.ndarray:
    """Of groups of about as many values each, ascending."""
    groups = min(max(len(values) // ALIKE, 1), MOST_TAILS)
    return np.unique(np.quantile(values, np.arange(1, groups) / groups))
