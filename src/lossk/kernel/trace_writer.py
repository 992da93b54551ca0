"""Loss traces to disk as they come: the factor form of a kernel, float16, in chunks of samples.

Sample i's deviations from its chain means are divided by s_i, a power of two near their standard deviation, and rounded
to float16: relative error u = 2^-11 each (2^-25 absolute below 2^-14; they never overflow, being at most sqrt(2 D)).
By Cauchy and Schwarz the error of a covariance is then at most (2 u + u^2) sqrt(K_ii K_jj), about 0.001 of R's range
in the worst case; roundings of D draws are independent, so it is typically u / sqrt(D), 1/2048 of the Monte Carlo
error. Means, variances and scales are float64 and exact; the diagonal is read from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lossk.checks import check_choice, check_integer, check_json, check_optional, check_path, check_tensor
from lossk.diagnostics.diagnostics import Diagnostics, diagnose
from lossk.disk.chunks import ArraySpec, Chunks
from lossk.disk.files import Digest, sync_tree
from lossk.disk.swap import in_one_step
from lossk.forms.centering import center, degrees_of_freedom, empty_moments, note
from lossk.forms.watched import Watched, watched_samples
from lossk.kernel.column_checks import check_excess, check_sets, check_tokens
from lossk.kernel.neighbors import median_noise_floor
from lossk.optional import check_run
from lossk.settings import check_n_beta, check_settings
from lossk.store.contents import Contents
from lossk.store.store import write_contents
from lossk.store.stored_factor import StoredFactor

CHUNK_BYTES = 2**24  # of a chunk on disk, about
MOST_SAMPLES = 4096  # of a chunk, which is also the kernel's tile
DTYPES = {"float16": torch.float16, "float32": torch.float32}


def chunk_samples(num_rows: int, dtype: str) -> int:
    """Samples per chunk of a factor of D rows: a multiple of 16, at most 4,096."""
    fitting = CHUNK_BYTES // (num_rows * DTYPES[dtype].itemsize)
    return max(16, min(MOST_SAMPLES, fitting // 16 * 16))


class TraceWriter:
    """Writes losses [C, T, N] to a store, some samples at a time; `lossk.open` reads it as their kernel.

        with lossk.TraceWriter("traces.lossk", num_chains=4, num_draws=250, num_samples=1_000_000) as writer:
            for losses in parts:  # [4, 250, n] each, the next n samples
                writer.append(losses)

    Takes about 40 bytes per draw and sample of one chunk, and 8 (C + 5) per sample (at 1,000 draws of 1,000,000 samples
    in 4 chains: 160 MB and 72 MB), whatever is appended. The store is complete once the block is left without an
    error, or `close` is called, and not there at all before; a process that is killed leaves a hidden `.part` folder.

    Args:
        path: of the store; an existing one is refused.
        centering: "chain" or "pooled", of the kernel.
        dtype: of the scaled deviations on disk, "float16" or "float32".
        chunk: samples per chunk; None = 16 MB each, at most 4,096 samples.
        excess: [C, T] rise of the training loss at each draw, if known, nats.
        n_beta: of the probe, if known.
        tokens: [N, 2] integers, (sample, position) of each column where these are losses of tokens.
        sets: name -> slice of the columns of one of several probe sets.
        meta: kept beside the numbers.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        num_chains: int,
        num_draws: int,
        num_samples: int,
        centering: str = "chain",
        dtype: str = "float16",
        chunk: int | None = None,
        excess: Tensor | None = None,
        n_beta: float | None = None,
        tokens: Tensor | None = None,
        sets: Mapping[str, slice] | None = None,
        meta: dict[str, Any] | None = None,
    ) -> None:
        where = check_path("path", path)
        check_run(stored=True)
        plain = check_settings(num_chains=num_chains, num_draws=num_draws, centering=centering)
        num_chains, num_draws, centering = plain["num_chains"], plain["num_draws"], plain["centering"]
        num_samples = check_integer("num_samples", num_samples, 1)
        chunk = check_optional(check_integer, "chunk", chunk, 1)
        dtype = check_choice("dtype", dtype, tuple(DTYPES))
        self.num_chains, self.num_draws, self.num_samples = num_chains, num_draws, num_samples
        self.centering, self.dtype = centering, dtype
        self.chunk = min(chunk or chunk_samples(num_chains * num_draws, dtype), num_samples)
        self.num_written = 0  # samples appended
        self._closed = False
        self._excess, self._n_beta = check_excess(excess, num_chains, num_draws), check_n_beta(n_beta)
        self._tokens, self._sets = check_tokens(tokens, num_samples), check_sets(sets, num_samples)
        self._meta = {} if meta is None else check_json("meta", meta)
        self._held = np.empty((num_chains, num_draws, self.chunk), dtype=np.float32)
        self._moments = empty_moments(num_chains, num_draws, num_samples, centering)
        self._watched = watched_samples(num_samples, num_chains * num_draws)
        self._watched_losses = torch.empty(num_chains, num_draws, len(self._watched), dtype=torch.float32, device="cpu")
        # of the losses, over samples
        self._total = torch.zeros(num_chains, num_draws, dtype=torch.float64, device="cpu")
        self._num_constant = 0
        self._known: dict[str, Digest] = {}  # of the files that were written
        self._writing = ExitStack()
        self._parts = self._writing.enter_context(in_one_step(where))
        try:
            shape, chunks = (num_chains * num_draws, num_samples), (num_chains * num_draws, self.chunk)
            spec = ArraySpec.of(shape, dtype, ("draw", "sample"), chunks)
            self._factor = Chunks.create(self._parts, "factor", spec, self._known)
        except BaseException as error:
            self._abandon(error)
            raise

    def append(self, losses: Tensor | np.ndarray) -> None:
        """Add the next n samples: [C, T, n] losses in nats, finite.

        Raises:
            ValueError: another shape, more samples than were announced, a non-finite loss, or a closed writer.
        """
        if self._closed:
            raise ValueError("the writer is closed")
        if not isinstance(losses, np.ndarray):  # of which parts only are read: it may lie on disk
            losses = check_tensor("losses", losses, of="a real number", finite=False)
        rest = self.num_samples - self.num_written
        right = losses.ndim == 3 and tuple(losses.shape[:2]) == (self.num_chains, self.num_draws)
        if not right or losses.shape[2] > rest:
            raise ValueError(
                f"losses must have shape [{self.num_chains}, {self.num_draws}, n] with n at most the {rest} samples "
                f"still to come, got {list(losses.shape)}"
            )
        start, stop = 0, losses.shape[2]
        while start < stop:
            held = self.num_written % self.chunk
            count = min(self.chunk - held, stop - start)
            given = check_tensor("losses", losses[:, :, start : start + count], of="a real number", finite=False)
            part = given.float().numpy(force=True)  # what float32 cannot hold is not finite
            self._refuse_non_finite(part)
            self._held[:, :, held : held + count] = part
            self.num_written, start = self.num_written + count, start + count
            if held + count == self.chunk or self.num_written == self.num_samples:
                self._write_chunk(self.num_written - held - count, torch.from_numpy(self._held[:, :, : held + count]))

    def _refuse_non_finite(self, part: np.ndarray) -> None:
        if not np.isfinite(part).all():
            chain, draw, sample = np.argwhere(~np.isfinite(part))[0].tolist()
            value = part[chain, draw, sample]
            at = f"chain {chain}, draw {draw}, sample {self.num_written + sample}"
            raise ValueError(f"losses must be finite; {at} is {value}")

    def _write_chunk(self, start: int, losses: Tensor) -> None:
        span = slice(start, start + losses.shape[2])
        centered = center(losses, self.centering, DTYPES[self.dtype])
        at = (0, start // self.chunk)
        self._known[self._factor.key(at)] = self._factor.write(at, centered.factor.numpy(), durable=False)
        note(self._moments, span, centered)
        self._total += losses.sum(dim=2, dtype=torch.float64)
        self._num_constant += int((losses == losses[:, :1]).all(dim=1).all(dim=0).sum())
        here = (self._watched >= span.start) & (self._watched < span.stop)
        self._watched_losses[:, :, here] = losses[:, :, self._watched[here] - span.start]

    def close(self) -> None:
        """Finish the store; again, nothing.

        Raises:
            ValueError: samples are missing; no store is left.
        """
        if self._closed:
            return
        self._closed = True
        try:
            if self.num_written < self.num_samples:
                raise ValueError(f"{self.num_written} of {self.num_samples} samples were appended; no store is written")
            self._finish()
        except BaseException as error:
            self._abandon(error)
            raise
        self._writing.close()

    def _finish(self) -> None:
        sync_tree(self._parts)
        contents = Contents(
            blocks=StoredFactor(self._factor, self._freedom, self._parts),
            moments=self._moments,
            meta=self._meta,
            diagnostics=self._diagnose(),
            tokens=None if self._tokens is None else self._tokens.long(),
            sets=self._sets,
        )
        write_contents(contents, self._parts, with_tiles=False, known=self._known)

    @property
    def _freedom(self) -> int:
        return degrees_of_freedom(self.num_chains, self.num_draws, self.centering)

    def _diagnose(self) -> Diagnostics:
        return diagnose(
            mean_loss=self._total / self.num_samples,
            watched=self._watched_losses,
            dead_share=self._num_constant / self.num_samples,
            noise_floor=median_noise_floor(self._moments, Watched(self._watched, self._watched_losses)),
            excess=self._excess,
            n_beta=self._n_beta,
            criteria=None,
            pilot=None,
            sampler=None,
        )

    def _abandon(self, error: BaseException) -> None:
        self._closed = True
        self._writing.__exit__(type(error), error, None)

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._abandon(error)
