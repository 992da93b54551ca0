"""What the numbers in a store must satisfy, and by how much rounding may violate it.

Let e bound an entry's error over sqrt(K_ii K_jj): (2 D + 12) 2^-24 for D draws, and at most as many rows of means,
accumulated in float32; 2^-11 more for tiles stored as float16, 2 2^-11 more for a factor stored as float16. Then, over
these square roots,

    diagonal of a tile     1, within e             any entry          at most 1 + e
    principal block        K's is positive semi-definite, so that of m samples has no eigenvalue below -m e
    block of the losses    the same block of the kernel, within e
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from lossk.forms.centering import center, degrees_of_freedom
from lossk.forms.watched import wrong_index

UNIT16, UNIT32 = 2.0**-11, 2.0**-24
BAND = 512  # rows of a tile compared at a time

Findings = tuple[list[str], list[str]]  # checks passed, problems


def entry_error(config: dict[str, Any], dtype: str) -> float:
    """e above."""
    error = (2 * config["num_chains"] * config["num_draws"] + 12) * UNIT32
    if dtype == "float16":
        error += 2.01 * UNIT16 if config["kind"] == "factor" else UNIT16
    return error


def check_moments(moments: dict[str, np.ndarray], config: dict[str, Any]) -> list[str]:
    """Problems of the per-sample arrays by themselves."""
    n, chains = config["num_samples"], config["num_chains"]
    problems = []
    for name, values in moments.items():
        shape = (chains, n) if name == "chain_mean" else (n,)
        if values.shape != shape:
            problems.append(f"{name}: shape {list(values.shape)}, config.json says {list(shape)}")
    if problems:
        return problems
    if (moments["variance"] < 0).any():
        problems.append(f"variance: sample {int(np.argmax(moments['variance'] < 0))} has a negative one")
    bad = np.frexp(moments["scale"])[0] != 0.5
    if bad.any():
        problems.append(f"scale: sample {int(np.argmax(bad))} has {moments['scale'][bad][0]}, not a power of two")
    off = np.abs(moments["chain_mean"].mean(axis=0) - moments["mean"])
    bad = off > 1e-12 * np.abs(moments["chain_mean"]).max(axis=0)
    if bad.any():
        problems.append(f"mean: of sample {int(np.argmax(bad))} is not the average of its chain_mean")
    return problems


def check_watched(
    index: np.ndarray, losses: np.ndarray, moments: dict[str, np.ndarray], config: dict[str, Any]
) -> Findings:
    """Whether the traces kept beside tiles are those of their samples: the same chain means, the same variances."""
    if wrong := wrong_index(index, config["num_samples"]):
        return [], [f"watched: {wrong}"]
    chains, draws, _ = losses.shape
    found = center(torch.from_numpy(losses), config["centering"], torch.float64)
    std = np.sqrt(moments["variance"][index])
    size = np.abs(moments["chain_mean"][:, index]).max(axis=0) + std
    off = np.abs(found.chain_mean.numpy() - moments["chain_mean"][:, index]).max(axis=0)
    bad = (off > 1e-9 * size) | (np.abs(found.variance.numpy() - std**2) > 1e-9 * size * std * chains * draws)
    if bad.any():
        return [], [f"watched_losses: of sample {int(index[np.argmax(bad)])} are not those of its mean and variance"]
    return [f"watched_losses: {len(index)} samples' traces have their chain means and variances"], []


def choose_blocks(alive: np.ndarray, num_blocks: int, side: int, seed: int) -> list[np.ndarray]:
    """Random samples that vary, ascending, for each block."""
    candidates, rng = np.flatnonzero(alive), np.random.default_rng(seed)
    count = min(side, len(candidates))
    return [np.sort(rng.choice(candidates, count, replace=False)) for _ in range(num_blocks)] if count else []


class _KernelCheck:
    """Fills the random blocks, as correlations, from chunks as they come."""

    def __init__(
        self, moments: dict[str, np.ndarray], config: dict[str, Any], dtype: str, blocks: list[np.ndarray]
    ) -> None:
        self.blocks, self.config = blocks, config
        self.error = entry_error(config, dtype)
        self.std = np.sqrt(moments["variance"]) / moments["scale"]  # [N], in stored units
        self.correlations = [np.full((len(block), len(block)), np.nan) for block in blocks]

    def judge(self) -> Findings:
        """Eigenvalues of the blocks whose entries could all be read."""
        whole = [r for r in self.correlations if np.isfinite(r).all()]
        if not whole:
            return [], []
        side = len(whole[0])
        least = min(float(np.linalg.eigvalsh(r)[0]) for r in whole)
        text = f"least eigenvalue of R {least:.2g} in {len(whole)} random blocks of {side} samples"
        if least < -side * self.error:
            return [], [f"not positive semi-definite: {text}, rounding explains {-side * self.error:.2g}"]
        return [f"{text}; rounding may reach {-side * self.error:.2g}"], []


class TileCheck(_KernelCheck):
    """Of tiles [a, b] of the upper triangle."""

    sound = True

    def add(self, coordinates: tuple[int, ...], region: tuple[slice, ...], tile: np.ndarray) -> list[str]:
        """Problems of one tile; its share of the random blocks is noted."""
        problems = self._look(coordinates, region, tile)
        self.sound = self.sound and not problems
        return problems

    def _look(self, coordinates: tuple[int, ...], region: tuple[slice, ...], tile: np.ndarray) -> list[str]:
        rows, columns = region
        where, problems = f"tiles: chunk {coordinates[0]}, {coordinates[1]}", []
        if rows == columns:
            problems += [f"{where} {text}" for text in self._diagonal(rows, tile)]
        for start in range(0, len(tile), BAND):
            part = tile[start : start + BAND].astype(np.float32)
            limit = np.outer(self.std[rows][start : start + BAND], self.std[columns]) * (1 + 2 * self.error)
            beyond = np.abs(part) > limit
            if beyond.any():
                a, b = np.argwhere(beyond)[0] + (rows.start + start, columns.start)
                problems.append(f"{where}: entry [{a}, {b}] is larger than the variances of its samples allow")
                break
        for block, r in zip(self.blocks, self.correlations, strict=True):
            at = np.flatnonzero((block >= rows.start) & (block < rows.stop))
            to = np.flatnonzero((block >= columns.start) & (block < columns.stop))
            part = tile[np.ix_(block[at] - rows.start, block[to] - columns.start)].astype(np.float64)
            part /= np.outer(self.std[block[at]], self.std[block[to]])
            r[np.ix_(at, to)] = part
            r[np.ix_(to, at)] = part.T
        return problems

    def _diagonal(self, rows: slice, tile: np.ndarray) -> list[str]:
        problems = []
        if any(not np.array_equal(tile[start : start + BAND], tile[:, start : start + BAND].T) for start in
               range(0, len(tile), BAND)):  # fmt: skip
            a, b = np.argwhere(tile != tile.T)[0] + rows.start
            problems.append(f"is not symmetric: entries [{a}, {b}] and [{b}, {a}] differ")
        variance = np.square(self.std[rows])
        off = np.abs(np.diagonal(tile).astype(np.float64) - variance) > self.error * variance
        if off.any():
            problems.append(f"has a diagonal that is not the variance, of {int(off.sum())} samples, the first "
                            f"{int(np.argmax(off)) + rows.start}")  # fmt: skip
        return problems

    def finish(self) -> Findings:
        checks, problems = self.judge()
        if self.sound:
            text = f"tiles: symmetric on the diagonal, which is the variance within {self.error:.2g} of itself"
            checks.insert(0, f"{text}; no entry beyond its two variances")
        return checks, problems


class FactorCheck(_KernelCheck):
    """Of stripes [D, n] of the factor."""

    def __init__(
        self, moments: dict[str, np.ndarray], config: dict[str, Any], dtype: str, blocks: list[np.ndarray]
    ) -> None:
        super().__init__(moments, config, dtype, blocks)
        rows = config["num_chains"] * config["num_draws"]
        self.columns = [np.full((rows, len(block)), np.nan) for block in blocks]

    def add(self, coordinates: tuple[int, ...], region: tuple[slice, ...], stripe: np.ndarray) -> list[str]:
        """Problems of one stripe; its columns of the random blocks are noted."""
        span = region[1]
        wide = stripe.astype(np.float32)
        variance = np.square(self.std[span])
        off = np.abs(np.square(wide).sum(axis=0, dtype=np.float64) / self.config["freedom"] - variance)
        for block, columns in zip(self.blocks, self.columns, strict=True):
            at = np.flatnonzero((block >= span.start) & (block < span.stop))
            columns[:, at] = wide[:, block[at] - span.start]
        bad = off > self.error * variance
        if not bad.any():
            return []
        return [f"factor: chunk {', '.join(map(str, coordinates))} has squares that do not add up to the variance, of "
                f"{int(bad.sum())} samples, the first {int(np.argmax(bad)) + span.start}"]  # fmt: skip

    def finish(self) -> Findings:
        for block, columns, r in zip(self.blocks, self.columns, self.correlations, strict=True):
            r[:] = columns.T @ columns / self.config["freedom"] / np.outer(self.std[block], self.std[block])
        return self.judge()


class LossCheck:
    """Compares the first random block with the covariance of its samples' stored losses."""

    def __init__(self, moments: dict[str, np.ndarray], config: dict[str, Any], kernel: _KernelCheck) -> None:
        self.kernel, self.config, self.moments = kernel, config, moments
        self.samples = kernel.blocks[0] if kernel.blocks else np.empty(0, dtype=np.int64)
        shape = (config["num_chains"], config["num_draws"], len(self.samples))
        self.losses = np.full(shape, np.nan, dtype=np.float32)

    def add(self, region: tuple[slice, ...], values: np.ndarray) -> None:
        """Note the block's samples of a chunk [c, t, n] of the losses."""
        chains, draws, span = region
        at = np.flatnonzero((self.samples >= span.start) & (self.samples < span.stop))
        self.losses[chains, draws, at] = values[:, :, self.samples[at] - span.start]

    def finish(self) -> Findings:
        if not len(self.samples) or not (
            np.isfinite(self.losses).all() and np.isfinite(self.kernel.correlations[0]).all()
        ):
            return [], []
        chains, draws, count = self.losses.shape
        centering = self.config["centering"]
        found = center(torch.from_numpy(self.losses), centering, torch.float64)
        factor = (found.factor * (found.scale / torch.from_numpy(self.moments["scale"][self.samples]))).numpy()
        std = self.kernel.std[self.samples]
        expected = factor.T @ factor / degrees_of_freedom(chains, draws, centering) / np.outer(std, std)
        off = np.abs(expected - self.kernel.correlations[0])
        a, b = self.samples[list(np.unravel_index(np.argmax(off), off.shape))]
        text = f"the block of {count} random samples and the covariance of their losses differ by {off.max():.2g}"
        if off.max() > 2 * self.kernel.error:
            return [], [f"{text} sqrt(K_ii K_jj) at [{a}, {b}]; rounding explains {2 * self.kernel.error:.2g}"]
        return [f"{text} sqrt(K_ii K_jj); rounding may reach {2 * self.kernel.error:.2g}"], []
