"""The loss kernel as its user reads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lossk.checks import (
    check_choice,
    check_flag,
    check_instance,
    check_integer,
    check_mapping,
    check_path,
    check_tensor,
    wrong_kind,
)
from lossk.diagnostics.diagnostics import Diagnostics
from lossk.forms.blocks import Blocks, FactorBlocks, Moments, tile_spans, upper_triangle
from lossk.forms.names import Names, read_names
from lossk.forms.watched import Watched, watched_in
from lossk.kernel.card import card
from lossk.kernel.chance import Chance
from lossk.kernel.column_checks import check_diagnostics, check_sets, check_tokens
from lossk.kernel.dense import AsArray, Whole, dense, refuse_too_large, times
from lossk.kernel.described import Described
from lossk.kernel.export import write_npy, write_zarr
from lossk.kernel.indexing import is_integer, resolve, rows_and_columns
from lossk.kernel.neighbors import Neighbors, device_for_neighbors, nearest, nearest_of_rows, nearest_on_device
from lossk.kernel.read_memory import check_block, check_dense, check_eigenpairs, check_matvec, check_neighbors
from lossk.kernel.spectrum import leading, way_of
from lossk.kernel.standard_error import METHODS, from_draws, from_moments, method_for
from lossk.kernel.trace_factor import factor_of
from lossk.kernel.traces import LossTraces
from lossk.kernel.views import Views
from lossk.kernel.watched_errors import WatchedErrors, watched_errors
from lossk.ops.top_correlations import BACKENDS
from lossk.settings import CENTERINGS
from lossk.store.contents import Contents
from lossk.store.store import save_contents


class LossKernel(Described, Views, AsArray):
    """K_ij = Cov(loss_i, loss_j) over SGLD draws around the trained weights (arXiv 2509.26537).

    Held as dense triangular tiles (streamed) or as the low-rank factor of centered traces; both give the same numbers.
    All entries are in nats^2. The kernel is symmetric and positive semi-definite up to rounding. NumPy and scikit-learn
    take it as an array of shape (N, N), `np.asarray(kernel)`, within the limit of `to_numpy`.
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
        watched: Watched | None = None,
        names: Names | None = None,
    ) -> None:
        if isinstance(blocks, type) or not hasattr(blocks, "row_blocks"):
            raise wrong_kind("blocks", "the blocks of a kernel", blocks)
        self._blocks = blocks
        self._moments: Moments = check_instance("moments", moments, Moments)
        self.meta = {} if meta is None else check_mapping("meta", meta)
        self.diagnostics: Diagnostics | None = check_diagnostics(diagnostics)
        self._tokens, self._sets = check_tokens(tokens, blocks.num_samples), check_sets(sets, blocks.num_samples)
        check_instance("watched", watched, Watched, optional=True)
        self._names = Names() if names is None else check_instance("names", names, Names).check(blocks.num_samples)
        self._beside, self._chance = watched, Chance(blocks, moments, self._watched)
        self._std_over_scale = (moments.variance.sqrt() / moments.scale).float()  # [N], 0 for a dead sample
        self._gain = torch.where(self._std_over_scale > 0, 1.0 / self._std_over_scale, 0.0)  # [N]

    @classmethod
    def from_traces(cls, traces: LossTraces, *, centering: str = "chain") -> LossKernel:
        """The kernel of given traces, held as its low-rank factor [C T, N] float32.

        Args:
            traces: [C, T, N] losses, T at least 2.
            centering: "chain" or "pooled".
        """
        return cls._of_traces(traces, centering)

    @classmethod
    def _of_traces(cls, traces: LossTraces, centering: str, *, overwrite: bool = False) -> LossKernel:
        """The same; with `overwrite` in the memory of the traces, whose losses are then lost."""
        check_instance("traces", traces, LossTraces)
        centering = check_choice("centering", centering, CENTERINGS)
        blocks, moments, diagnostics = factor_of(traces, centering, overwrite=overwrite)
        return cls(blocks, moments, meta=traces.meta, diagnostics=diagnostics, tokens=traces.tokens, sets=traces.sets)

    @property
    def contents(self) -> Contents:
        """What it consists of, as data: all that a store keeps of it."""
        return Contents(
            blocks=self._blocks,
            moments=self._moments,
            meta=self.meta,
            diagnostics=self.diagnostics,
            tokens=self._tokens,
            sets=self._sets,
            watched=self._beside,
            names=self._names,
        )

    def named(self, *, ids: Any = None, labels: Any = None) -> LossKernel:
        """The same kernel whose rows are called so, sharing all else; tables, pictures and reports show it.

        Args:
            ids: [N] integers or texts, each another; None keeps the kernel's.
            labels: [N] classes, integers from 0 or texts; None keeps the kernel's.
        """
        given = read_names(ids, labels).check(self.num_samples)
        mine = self._names if labels is None else given
        names = Names(self.ids if ids is None else given.ids, mine.labels, mine.class_names)
        parts = {field.name: getattr(self.contents, field.name) for field in fields(Contents)}
        return LossKernel(parts.pop("blocks"), parts.pop("moments"), **parts | {"names": names})

    def _repr_html_(self) -> str:
        return card(self)

    # -- blocks -----------------------------------------------------------------------------------------------------

    def __getitem__(self, key: Any) -> Tensor:
        """Covariance block `kernel[rows, columns]` (or `kernel[rows]`): [r, c] float32, nats^2.

        Rows and columns may be integers, slices, lists, integer tensors or boolean masks of length N. Two integers give
        a scalar [], as NumPy does; a lone one keeps its dimension, of length 1. Until 0.1.0 `kernel[i, j]` was [1, 1]:
        that is `kernel[[i], [j]]`. Covariances below 1e-38 underflow to 0 here; correlations do not.

        Raises:
            IndexError: out of range, or a mask of another length.
            TypeError: neither integers nor a mask.
        """
        rows, columns = rows_and_columns(key)
        entry = is_integer(rows) and is_integer(columns)
        rows, columns = self._index(rows), self._index(columns, "columns")
        check_block(self._blocks, len(rows), len(columns))
        scale = self._moments.scale.float()
        block = self._blocks.gather(rows, columns).mul_(scale[rows].unsqueeze(1)).mul_(scale[columns])
        block = torch.where(rows.unsqueeze(1) == columns, self.variance.float()[columns], block, out=block)
        return block.reshape(()) if entry else block

    def correlation(self, rows: Any = slice(None), columns: Any = slice(None)) -> Tensor:
        """Correlation block R_ij = K_ij / sqrt(K_ii K_jj): [r, c] float32 in [-1, 1].

        Where a variance is zero, R_ij = 0 for i != j and R_ii = 1.
        """
        rows, columns = self._index(rows), self._index(columns, "columns")
        check_block(self._blocks, len(rows), len(columns))
        block = self._blocks.gather(rows, columns).mul_(self._gain[rows].unsqueeze(1)).mul_(self._gain[columns])
        one = torch.ones((), dtype=torch.float32, device="cpu")
        return torch.where(rows.unsqueeze(1) == columns, one, block.clamp_(-1.0, 1.0), out=block)

    def standard_error(
        self, rows: Any = slice(None), columns: Any = slice(None), *, correlation: bool = False, method: str = "auto"
    ) -> Tensor:
        """Monte Carlo standard error of a covariance block (or correlation block): [r, c] float32, nats^2 (or 1).

        Args:
            method: "interval": from the draws' own products, by batches of every length, whatever the law and memory of
                the losses (`lossk.kernel.product_errors`), as long as the skewness and tails of these products ask for:
                +- 1.96 of it cover 91 to 97 % (docs/calibration.md). Needs the factor form. "watched": "lag1" times the
                ratio "interval" over "lag1" of the up to 256 samples whose traces are kept
                (`lossk.kernel.watched_errors`). "products": "interval" without that length, the size that errors
                usually have; +- 1.96 of it cover less where losses are skewed and effective draws are few.
                "chains": the spread of the C chains' own kernels over sqrt(C); needs the factor form, chain centering
                and at least 2 chains. Read it with t of C - 1 degrees of freedom (4 chains: +- 3.18 cover 95 %).
                "lag1": with each loss's lag-1 autocorrelation r, D = C (T - 1), f = (1 + r_i r_j) / (1 - r_i r_j),
                se(K_ij)^2 = (K_ii K_jj + K_ij^2) f / D,  se(R_ij) = (1 - R_ij^2) sqrt(f / D) (Bartlett 1935): right for
                normal AR(1) traces; for those of networks it can be several times too small or too large.
                "auto": "interval" where the draws are in memory, else "watched"; "lag1" where no traces are kept.
        """
        method, correlation = check_choice("method", method, METHODS), check_flag("correlation", correlation)
        rows, columns = self._index(rows), self._index(columns, "columns")
        method = method_for(self._blocks, watched=self._beside is not None) if method == "auto" else method
        if method in ("products", "interval", "chains"):
            return from_draws(self._blocks, self._moments, rows, columns, correlation=correlation, method=method)
        fitted = self._fitted_errors if method == "watched" else None
        return from_moments(self._blocks, self._moments, fitted, rows, columns, correlation=correlation)

    @cached_property
    def _fitted_errors(self) -> WatchedErrors:
        return watched_errors(self._watched(), self._moments)

    def _correlate(self, block: Tensor, rows: Tensor | slice, columns: Tensor | slice) -> Tensor:
        return (block * self._gain[rows].unsqueeze(1)).mul_(self._gain[columns]).clamp_(-1.0, 1.0)

    def _watched(self) -> Watched | None:
        """Up to 256 samples' own traces, beside tiles or from the factor; None of an earlier version's tiles."""
        return watched_in(self._blocks, self._moments) if self._beside is None else self._beside

    def _index(self, key: Any, name: str = "rows") -> Tensor:
        return resolve(key, self.num_samples, name)

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
            yield i, j, (self._scaled_tile(i, j) * scale[spans[i]].unsqueeze(1)).mul_(scale[spans[j]])

    def matvec(self, v: Tensor | np.ndarray) -> Tensor:
        """K v for v [N] or [N, m], in float64 and without forming K; the result has v's shape.

        In factor form K is F'F, two passes over F, its rounded diagonal included: positive semi-definite in any dtype.
        """
        v = check_tensor("v", v, of="a real number").to("cpu", torch.float64)
        if v.ndim not in (1, 2) or v.shape[0] != self.num_samples:
            raise ValueError(f"v must have shape [{self.num_samples}] or [{self.num_samples}, m], got {list(v.shape)}")
        check_matvec(self._blocks, v.numel() // self.num_samples)
        scale = self._moments.scale.unsqueeze(1)
        return (scale * self._scaled_matmul(scale * v.reshape(self.num_samples, -1))).reshape(v.shape)

    __matmul__ = matvec

    def _scaled_matmul(self, v: Tensor) -> Tensor:
        if isinstance(self._blocks, FactorBlocks):
            return self._blocks.matmul(v)
        spans = self._spans()
        return times(((i, j, self._scaled_tile(i, j)) for i, j in upper_triangle(len(spans))), spans, v)

    def eigsh(self, k: int = 6) -> tuple[Tensor, Tensor]:
        """The k largest eigenvalues [k], descending, and their eigenvectors [N, k]: float64, nats^2.

        Exact from the draws' Gram matrix (two passes over the factor) in factor form with at most 4,096 draws in all;
        else ARPACK (SciPy) on `matvec`, from a fixed start; a dense solver for small N.
        """
        n = self.num_samples
        k = check_integer("k", k, 1, n, limit=f"the number of samples, {n}")
        factor = self._blocks if isinstance(self._blocks, FactorBlocks) else None
        check_eigenpairs(self._blocks, k, way_of(factor, n, k))
        return leading(self.matvec, factor, self._moments.scale, k)

    def neighbors(self, k: int = 10, rows: Any = None, *, anti: bool = False, backend: str | None = None) -> Neighbors:
        """The k most correlated other samples of each sample, by streaming over tiles; ties go to the smaller index.

        Args:
            rows: the samples whose neighbors are wanted (any index that `kernel[rows]` takes), among all N; None for
                all of them. r rows cost r N pairs instead of N^2 / 2.
            anti: the k most anti-correlated instead, lowest first; the floor is then one for -R.
            backend: "torch", or "triton" (all rows, k up to 64; the same within a rounding of the correlations), to
                which tiles in host memory go one by one. None is "triton" where the tiles lie on a CUDA device on which
                it passes its self-test.

        Returns:
            Neighbors(index [N, k] int64, correlation [N, k] float32, noise_floor [N] float32), or r instead of N. A
            correlation below its row's noise floor is what the best of N unrelated samples would show (by chance alone
            one neighbor per row is expected above it), as losses of different chains show it (`lossk.kernel.chance`).
            Dead samples have no neighbors (index -1) and are nobody's.

        Memory beyond the result and the form itself: of all rows, about five tiles in float32 (350 MB at side 4,096);
        of some, two blocks of r rows (4,096 at a time) by a tile's side.
        """
        k = check_integer("k", k, 1, self.num_samples - 1, limit=f"N - 1 = {self.num_samples - 1}")
        anti, backend = check_flag("anti", anti), check_choice("backend", backend, (None, *BACKENDS))
        if anti and backend == "triton":
            raise ValueError("anti must be False with backend='triton', which ranks the largest only, got True")
        device = device_for_neighbors(self._blocks, k, backend)
        chosen = None if rows is None else self._index(rows)
        check_neighbors(self._blocks, k, None if chosen is None else len(chosen))
        if rows is None:
            if device is None or anti:
                found = nearest(self._correlation_tile, self.dead, self.tile, k, anti=anti)
            else:
                found = nearest_on_device(self._blocks.tile_on, self._gain, self.tile, k, device)
            floor = self._chance.of(self._index(slice(None)), anti=anti).floor()
            return found._replace(noise_floor=floor).of(None, self.names)
        if backend == "triton":
            raise ValueError("rows must be None with backend='triton', which ranks whole tiles")
        assert chosen is not None
        found = nearest_of_rows(self._correlation_rows, self.dead, chosen, k, anti=anti)
        return found._replace(noise_floor=self._chance.of(chosen, anti=anti).floor()).of(chosen, self.names)

    def _correlation_rows(self, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
        return ((span, self._correlate(block, rows, span)) for span, block in self._blocks.row_blocks(rows))

    def to_numpy(self, correlation: bool = False) -> np.ndarray:
        """The whole matrix: [N, N] float32. Refuses, with the size, when it would not fit into free memory.

        Raises:
            MemoryError: the matrix needs more than the memory now available.
        """
        correlation, n = check_flag("correlation", correlation), self.num_samples
        refuse_too_large(n, n, "read blocks (kernel[rows, columns]) or iterate kernel.tiles()")
        check_dense(self._blocks)
        return dense(self._whole(correlation))

    def to_zarr(self, path: str | Path, *, correlation: bool = False) -> None:
        """Write the whole matrix as a Zarr v3 group, which xarray and dask open: `covariance` [N, N] float32, nats^2
        (or `correlation`), and [N] float64 `variance` and `mean_loss`.

        Streams: takes 4 N^2 bytes of disk and the memory of a few tiles.

        Raises:
            FileExistsError: `path` exists.
            OSError: the matrix does not fit onto the disk.
        """
        path, correlation = check_path("path", path), check_flag("correlation", correlation)
        write_zarr(self.contents, self._whole(correlation), path, correlation=correlation)

    def to_memmap(self, path: str | Path, *, correlation: bool = False) -> np.memmap:
        """Write the whole matrix [N, N] float32 as an .npy file; returns it as a read-only memory map.

        Streams and raises as `to_zarr` does.
        """
        path, correlation = check_path("path", path), check_flag("correlation", correlation)
        return write_npy(self._whole(correlation), path)

    def _whole(self, correlation: bool) -> Whole:
        diagonal = torch.ones_like(self._gain) if correlation else self.variance.float()
        return Whole(self.correlation_tiles() if correlation else self.tiles(), diagonal, self.tile)

    def correlation_tiles(self) -> Iterator[tuple[int, int, Tensor]]:
        """Iterate (i, j, correlation tile [a, b] float32) over the upper triangle, i <= j, as `tiles` does; the
        diagonal of a dead sample is 0 here."""
        return ((i, j, self._correlation_tile(i, j)) for i, j in upper_triangle(len(self._spans())))

    def _correlation_tile(self, i: int, j: int) -> Tensor:
        spans = self._spans()
        return self._correlate(self._scaled_tile(i, j), spans[i], spans[j])

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write a `.lossk` store, which `lossk.open` reads. An existing path is refused unless `overwrite`."""
        save_contents(self.contents, check_path("path", path), overwrite=check_flag("overwrite", overwrite))
