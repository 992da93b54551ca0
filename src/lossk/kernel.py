"""The loss kernel as its user reads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from lossk.blocks import Blocks, FactorBlocks, Moments, power_of_two_near, tile_spans, upper_triangle
from lossk.neighbors import Neighbors, median_noise_floor, nearest, noise_floor
from lossk.settings import CENTERINGS, check_choice

if TYPE_CHECKING:
    from lossk.diagnostics import Diagnostics
    from lossk.traces import LossTraces

ROWS_AT_A_TIME = 1024  # of a tile, in float64 products
DENSE_EIGENSOLVER = 512  # samples up to which a dense solver is quicker and more robust than an iterative one


class LossKernel:
    """K_ij = Cov(loss_i, loss_j) over SGLD draws around the trained weights (arXiv 2509.26537).

    Held as dense triangular tiles (streamed) or as the low-rank factor of centred traces; both give the same numbers.
    All entries are in nats^2. The kernel is symmetric and positive semi-definite up to rounding.
    """

    def __init__(
        self,
        blocks: Blocks,
        moments: Moments,
        *,
        meta: dict[str, Any] | None = None,
        diagnostics: Diagnostics | None = None,
        tokens: Tensor | None = None,
        sets: Mapping[str, slice] | None = None,
    ) -> None:
        self._blocks = blocks
        self._moments = moments
        self.meta = meta or {}
        self.diagnostics = diagnostics
        self._tokens, self._sets = tokens, dict(sets or {})
        self._std_over_scale = (moments.variance.sqrt() / moments.scale).float()  # [N], 0 for a dead sample

    @classmethod
    def from_traces(cls, traces: LossTraces, *, centering: str = "chain") -> LossKernel:
        """The kernel of given traces, held as its low-rank factor [C T, N] float32.

        Args:
            traces: [C, T, N] losses, T at least 2.
            centering: "chain" or "pooled".
        """
        from lossk.diagnostics import diagnose_traces

        losses = traces.losses  # [C, T, N] float32
        num_chains, num_draws, num_samples = losses.shape
        check_choice("centering", centering, CENTERINGS)
        chain_mean = losses.double().mean(dim=1)
        mean = chain_mean.mean(dim=0)
        centre = chain_mean if centering == "chain" else mean.expand_as(chain_mean)
        freedom = num_chains * (num_draws - 1) if centering == "chain" else num_chains * num_draws - 1
        factor = torch.empty(num_chains * num_draws, num_samples)
        variance = torch.zeros(num_samples, dtype=torch.float64)
        within = torch.zeros_like(variance)
        products = torch.zeros_like(variance)
        for c in range(num_chains):
            deviations = losses[c].double() - chain_mean[c]
            within += deviations.square().sum(dim=0)
            products += (deviations[1:] * deviations[:-1]).sum(dim=0)
            variance += (losses[c].double() - centre[c]).square().sum(dim=0)
        variance /= freedom
        scale = torch.where(variance > 0, power_of_two_near(variance.sqrt()), 1.0)
        for c in range(num_chains):
            factor[c * num_draws : (c + 1) * num_draws] = (losses[c].double() - centre[c]) / scale
        lag1 = torch.where(within > 0, products / within.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
        moments = Moments(mean, variance, scale, chain_mean, lag1, num_chains, num_draws, centering)
        floor = median_noise_floor(moments)
        diagnostics = diagnose_traces(traces, floor)
        return cls(
            FactorBlocks(factor, freedom),
            moments,
            meta=traces.meta,
            diagnostics=diagnostics,
            tokens=traces.tokens,
            sets=traces.sets,
        )

    # -- what it is -------------------------------------------------------------------------------------------------

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
    def dead(self) -> Tensor:
        """[N] bool: samples whose loss never varied."""
        return self._moments.variance == 0

    def __len__(self) -> int:
        return self.num_samples

    def __repr__(self) -> str:
        unit = "samples" if self.tokens is None else "tokens"
        sets = f", sets {', '.join(self._sets)}" if self._sets else ""
        return (
            f"LossKernel({self.num_samples} {unit}, {self.num_chains} chains x {self.num_draws} draws, "
            f"{self._blocks.kind} in {self.dtype}, {int(self.dead.sum())} dead{sets})"
        )

    # -- blocks -----------------------------------------------------------------------------------------------------

    def __getitem__(self, key: Any) -> Tensor:
        """Covariance block `kernel[rows, columns]` (or `kernel[rows]`): [r, c] float32, nats^2.

        Rows and columns may be integers, slices, lists, integer tensors or boolean masks of length N; an integer keeps
        its dimension (of length 1). Covariances below 1e-38 underflow to 0 here; correlations do not.

        Raises:
            IndexError: out of range, or a mask of another length.
        """
        rows, columns = key if isinstance(key, tuple) and len(key) == 2 else (key, slice(None))
        rows, columns = self._resolve(rows), self._resolve(columns)
        scale = self._moments.scale.float()
        block = self._blocks.gather(rows, columns) * scale[rows].unsqueeze(1) * scale[columns]
        return torch.where(rows.unsqueeze(1) == columns, self.variance.float()[columns], block)

    def correlation(self, rows: Any = slice(None), columns: Any = slice(None)) -> Tensor:
        """Correlation block R_ij = K_ij / sqrt(K_ii K_jj): [r, c] float32 in [-1, 1].

        Where a variance is zero, R_ij = 0 for i != j and R_ii = 1.
        """
        rows, columns = self._resolve(rows), self._resolve(columns)
        block = self._correlate(self._blocks.gather(rows, columns), rows, columns)
        return torch.where(rows.unsqueeze(1) == columns, torch.ones(()), block)

    def standard_error(
        self, rows: Any = slice(None), columns: Any = slice(None), *, correlation: bool = False, method: str = "lag1"
    ) -> Tensor:
        """Monte Carlo standard error of a covariance block (or correlation block): [r, c] float32, nats^2 (or 1).

        Args:
            method: "lag1" from each loss's lag-1 autocorrelation r and D = C (T - 1) draws (Bartlett 1935, for traces
                near AR(1)): with f = (1 + r_i r_j) / (1 - r_i r_j),
                se(K_ij)^2 = (K_ii K_jj + K_ij^2) f / D,  se(R_ij) = (1 - R_ij^2) sqrt(f / D).
                "chains": the spread of the C chains' own kernels over sqrt(C), whatever the traces; needs the factor
                form, chain centring, and at least 2 chains (and many for a steady answer).
        """
        check_choice("method", method, ("lag1", "chains"))
        rows, columns = self._resolve(rows), self._resolve(columns)
        if method == "chains":
            return self._chain_spread(rows, columns, correlation)
        lag1 = self._moments.lag1.clamp(-0.99, 0.99)
        product = lag1[rows].unsqueeze(1) * lag1[columns]
        relative = ((1 + product) / (1 - product) / (self.num_chains * (self.num_draws - 1))).sqrt()
        if correlation:
            return ((1 - self.correlation(rows, columns).double().square()) * relative).float()
        scaled = self._blocks.gather(rows, columns).double()
        ratio = self._std_over_scale.double()
        spread = ((ratio[rows].unsqueeze(1) * ratio[columns]).square() + scaled.square()).sqrt() * relative
        scale = self._moments.scale
        return (spread * scale[rows].unsqueeze(1) * scale[columns]).float()

    def _chain_spread(self, rows: Tensor, columns: Tensor, correlation: bool) -> Tensor:
        if not isinstance(self._blocks, FactorBlocks) or self.centering != "chain" or self.num_chains < 2:
            raise ValueError(
                "method='chains' needs a kernel from traces (LossKernel.from_traces), centering='chain' and at least "
                f"2 chains, got {self._blocks.kind}, {self.centering!r}, {self.num_chains}"
            )
        parts = self._blocks.factor.double().split(self.num_draws)  # C times [T, N]
        kernels = torch.stack([part[:, rows].T @ part[:, columns] for part in parts]) / (self.num_draws - 1)
        if correlation:
            spread = torch.stack([part.square().sum(dim=0) / (self.num_draws - 1) for part in parts]).sqrt()  # [C, N]
            size = spread[:, rows].unsqueeze(2) * spread[:, columns].unsqueeze(1)
            kernels = torch.where(size > 0, kernels / size.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
        error = kernels.std(dim=0) / self.num_chains**0.5
        if not correlation:
            error *= self._moments.scale[rows].unsqueeze(1) * self._moments.scale[columns]
        return error.float()

    def _correlate(self, block: Tensor, rows: Tensor | slice, columns: Tensor | slice) -> Tensor:
        inverse = torch.where(self._std_over_scale > 0, 1.0 / self._std_over_scale, 0.0)
        return (block * inverse[rows].unsqueeze(1) * inverse[columns]).clamp_(-1.0, 1.0)

    def _resolve(self, key: Any) -> Tensor:
        """Any index as a 1-D int64 tensor within range."""
        if isinstance(key, slice):
            return torch.arange(*key.indices(self.num_samples))
        if isinstance(key, int | np.integer) and not isinstance(key, bool):
            key = [int(key)]
        if isinstance(key, list | tuple | range):
            key = np.asarray(key) if len(key) else np.empty(0, dtype=np.int64)
        index = torch.as_tensor(key)
        if index.ndim != 1:
            raise IndexError(f"an index must be one-dimensional, got shape {list(index.shape)}")
        if index.dtype == torch.bool:
            if len(index) != self.num_samples:
                raise IndexError(f"a mask must have one entry per sample, {self.num_samples}, got {len(index)}")
            return index.nonzero().squeeze(1).cpu()
        if index.is_floating_point() or index.is_complex():
            raise IndexError(f"an index must be integers, a mask or a slice, got {index.dtype}")
        index = index.long().cpu()
        outside = (index < -self.num_samples) | (index >= self.num_samples)
        if outside.any():
            raise IndexError(f"index {int(index[outside][0])} is out of range for {self.num_samples} samples")
        return torch.where(index < 0, index + self.num_samples, index)

    # -- whole-kernel operations, a tile at a time ------------------------------------------------------------------

    def _spans(self) -> list[slice]:
        return tile_spans(self.num_samples, self.tile)

    def _scaled_tile(self, i: int, j: int) -> Tensor:
        tile = self._blocks.read_tile(i, j)
        if i == j:
            tile = tile.clone()
            tile.diagonal().copy_(self._std_over_scale[self._spans()[i]].square())
        return tile

    def tiles(self) -> Iterator[tuple[int, int, Tensor]]:
        """Iterate (i, j, covariance tile [a, b] float32) over the upper triangle, i <= j."""
        spans, scale = self._spans(), self._moments.scale.float()
        for i, j in upper_triangle(len(spans)):
            yield i, j, self._scaled_tile(i, j) * scale[spans[i]].unsqueeze(1) * scale[spans[j]]

    def matvec(self, v: Tensor | np.ndarray) -> Tensor:
        """K v for v [N] or [N, m], in float64 and without forming K; the result has v's shape."""
        v = torch.as_tensor(v).double()
        if v.ndim not in (1, 2) or v.shape[0] != self.num_samples:
            raise ValueError(f"v must have shape [{self.num_samples}] or [{self.num_samples}, m], got {list(v.shape)}")
        scale = self._moments.scale.unsqueeze(1)
        return (scale * self._scaled_matmul(scale * v.reshape(self.num_samples, -1))).reshape(v.shape)

    __matmul__ = matvec

    def _scaled_matmul(self, v: Tensor) -> Tensor:
        out, spans = torch.zeros_like(v), self._spans()
        for i, j in upper_triangle(len(spans)):
            rows, columns, tile = spans[i], spans[j], self._scaled_tile(i, j)
            for start in range(0, len(tile), ROWS_AT_A_TIME):
                part = tile[start : start + ROWS_AT_A_TIME].double()
                here = slice(rows.start + start, rows.start + start + len(part))
                out[here] += part @ v[columns]
                if i != j:
                    out[columns] += part.T @ v[here]
        return out

    def eigsh(self, k: int = 6) -> tuple[Tensor, Tensor]:
        """The k largest eigenvalues [k], descending, and their eigenvectors [N, k]: float64, nats^2.

        ARPACK (SciPy) on `matvec`, from a fixed start; a dense solver for small N.
        """
        n = self.num_samples
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= n:
            raise ValueError(f"k must be an integer from 1 to the number of samples, {n}, got {k!r}")
        if n <= DENSE_EIGENSOLVER or k >= n - 1:
            values, vectors = np.linalg.eigh(self.matvec(torch.eye(n, dtype=torch.float64)).numpy())
        else:
            operator = LinearOperator((n, n), matvec=lambda v: self.matvec(v).numpy(), dtype=np.float64)
            start = np.random.default_rng(0).standard_normal(n)
            values, vectors = eigsh(operator, k=k, which="LA", v0=start)
        order = np.argsort(values)[::-1][:k].copy()
        return torch.from_numpy(values[order]), torch.from_numpy(vectors[:, order])

    def neighbors(self, k: int = 10) -> Neighbors:
        """The k most correlated other samples of each sample, by streaming over tiles; ties go to the smaller index.

        Returns:
            Neighbors(index [N, k] int64, correlation [N, k] float32, noise_floor [N] float32). A correlation below its
            row's noise floor is what the best of N unrelated samples would show (by chance alone one neighbour per
            row is expected above it). Dead samples have no neighbours (index -1) and are nobody's.
        """
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k < self.num_samples:
            raise ValueError(f"k must be an integer from 1 to N - 1 = {self.num_samples - 1}, got {k!r}")
        found = nearest(self._correlation_tile, self.dead, self.tile, k)
        return found._replace(noise_floor=noise_floor(self._moments))

    def to_numpy(self, correlation: bool = False) -> np.ndarray:
        """The whole matrix: [N, N] float32. Refuses, with the size, when it would not fit into free memory.

        Raises:
            MemoryError: the matrix needs more than the memory now available.
        """
        n = self.num_samples
        needed, free = 4 * n * n, psutil.virtual_memory().available
        if needed > 0.9 * free:
            raise MemoryError(
                f"the {n} x {n} matrix needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are available; "
                "read blocks (kernel[rows, columns]) or iterate kernel.tiles()"
            )
        out, spans = np.empty((n, n), dtype=np.float32), self._spans()
        pairs = upper_triangle(len(spans))
        tiles = ((i, j, self._correlation_tile(i, j)) for i, j in pairs) if correlation else self.tiles()
        for i, j, tile in tiles:
            out[spans[i], spans[j]] = tile.numpy()
            out[spans[j], spans[i]] = tile.numpy().T
        np.fill_diagonal(out, 1.0 if correlation else self.variance.float().numpy())
        return out

    def _correlation_tile(self, i: int, j: int) -> Tensor:
        spans = self._spans()
        return self._correlate(self._scaled_tile(i, j), spans[i], spans[j])

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write a `.lossk` store, which `lossk.open` reads. An existing path is refused unless `overwrite`."""
        from lossk.store import save_kernel

        save_kernel(self, Path(path), overwrite=overwrite)
