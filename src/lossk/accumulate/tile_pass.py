"""Tiles made out of core: in one pass at the end of a run, from the log of its draws, each written once.

While draws are sampled only the moments are kept. Then, with every sample's mean and scale known, a tile is one product
of centered, scaled draws read back from the log; of all draws at once where memory allows. With g tile rows held at a
time the log is read about (n / g + 1) / 2 times, n being the tile rows of the kernel.

Against the tiles kept in memory (`lossk.accumulate.tiles`): both sum the same D products, there of deviations from
panel means with a row for each step of the mean, here of deviations from the final mean. Each is within (D + 12) u
sqrt(K_ii K_jj) of the exact sum, u = 2^-24 (test_streaming.py), so they differ by at most twice that, and in
float16 by the spacing of float16 besides. A tile depends on the log, the moments and `super_panel` only: made again, it
is the same to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from lossk.accumulate.runlog import RunLog
from lossk.accumulate.running import MomentsFirst, RunningMoments
from lossk.accumulate.tiles import add_rows, finish_tile
from lossk.disk.chunks import CRC_BYTES, Chunks
from lossk.disk.files import Digest, digest, forget, read_buffer, sync, sync_tree
from lossk.disk.sealed import LineLog, read_log
from lossk.errors import StoreError
from lossk.forms.blocks import Moments, TileBlocks, tile_spans
from lossk.plan.layout import Layout
from lossk.store.commits import Commit
from lossk.store.manifest import digest_of_chunk
from lossk.store.stored_tiles import StoredTiles, chunk_path, create_tiles

Key = tuple[int, int]
DONE = "tiles.jsonl"  # one line per durable tile


@dataclass(frozen=True)
class Share:
    """What one process makes of the tiles: all, or those that no other rank makes."""

    name: str = DONE  # of its log of tiles
    others: frozenset[Key] = frozenset()


class OutOfCore(MomentsFirst):
    """What `TileAccumulator` does, with the tiles in the store of `log`: same methods, same moments to the bit."""

    def __init__(
        self, log: RunLog, num_samples: int, tile: int, *, num_chains: int, num_draws: int, centering: str, dtype: str,
        layout: Layout, cache_bytes: int, share: Share | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            num_samples, tile, num_chains=num_chains, num_draws=num_draws, centering=centering, dtype=dtype
        )
        self.log, self.layout, self.cache_bytes, self.share = log, layout, cache_bytes, share or Share()

    def prepare(self) -> None:
        """Make the array, unless a killed run has; of one process, before any's `finalize`; one alone need not."""
        if self.share.name != DONE:
            prepare_tiles(self.log.path, self.num_samples, min(self.tile, self.num_samples), self.dtype)

    def finalize(self) -> tuple[TileBlocks, Moments]:
        """Make the tiles that are not in the store yet, from a log that is whole; read lazily from then on."""
        moments, side = self.running.finish(), min(self.tile, self.num_samples)
        rows = LoggedRows(self.log, self.running, moments, self.layout.super_panel)
        spans = tile_spans(self.num_samples, side)
        with TileWriter(self.log.path, self.num_samples, side, self.dtype, self.share.name) as writer:
            done = writer.done.keys() | self.share.others
            for key, tile in make_tiles(rows, spans, self.layout.stripes, done):
                writer.put(key, finish_tile(tile, key, self.running.freedom, self.dtype))
        known = writer.known()
        self.log.known |= known
        tiles = StoredTiles(self.log.path, side, self.cache_bytes, known=known)
        return TileBlocks(self.num_samples, self.tile, tiles), moments


class LoggedRows:
    """The centered, scaled draws of a log, super-panel by super-panel, as the products of tiles need them."""

    def __init__(self, log: RunLog, running: RunningMoments, moments: Moments, super_panel: int) -> None:
        self.log, self.moments = log, moments
        self.inverse = torch.where(moments.variance > 0, 1.0 / moments.scale, 0.0)  # [N]
        pooled = moments.centering == "pooled"
        self.between = running.between() if pooled else self.inverse.new_zeros(0, len(self.inverse))
        self.parts: list[list[Commit]] = []
        room = 0
        for commit in sorted(log.commits, key=lambda commit: (commit.chain, commit.first_draw)):
            draws = commit.draws
            if draws > room:
                self.parts.append([])
                room = super_panel
            self.parts[-1].append(commit)
            room -= draws

    def read(self, part: int, columns: slice) -> Tensor:
        """Some samples' rows of one super-panel: [d, s] float32; the last has the pooled centering's rows as well."""
        commits, inverse = self.parts[part], self.inverse[columns]
        between = self.between[:, columns] * inverse if part + 1 == len(self.parts) else self.between[:0, columns]
        count = sum(commit.draws for commit in commits)
        rows = torch.empty(count + len(between), len(inverse), dtype=torch.float32, device="cpu")
        first = 0
        for commit in commits:
            losses = self.log.read_panel(commit, columns).double()
            losses -= self.moments.chain_mean[commit.chain, columns]
            losses *= inverse
            rows[first : first + len(losses)] = losses
            first += len(losses)
        rows[first:] = between
        return rows


def make_tiles(
    rows: LoggedRows, spans: list[slice], stripes: int, done: AbstractSet[Key]
) -> Iterator[tuple[Key, Tensor]]:
    """Sums of products, [a, b] float32, of the tiles that are not done: `stripes` tile rows at a time, by columns.

    A tile is overwritten by the next but one: two buffers take turns, as freshly allocated ones, many megabytes each,
    leave holes in the heap that the next does not fit into.
    """
    side = spans[0].stop
    buffers = cycle([torch.empty(side * side, dtype=torch.float32, device="cpu") for _ in range(2)])
    for first in range(0, len(spans), stripes):
        group = range(first, min(first + stripes, len(spans)))
        held: dict[int, Tensor] = {}
        for j in range(first, len(spans)):
            keys = [(i, j) for i in group if i <= j and (i, j) not in done]
            if len(rows.parts) > 1:
                yield from ((key, _tile_in_parts(rows, spans, key, next(buffers))) for key in keys)
            elif keys:
                for i in {i for key in keys for i in key if i in group} - held.keys():
                    held[i] = rows.read(0, spans[i])
                right = held[j] if j in held else rows.read(0, spans[j])
                yield from ((key, _product(key, held[key[0]], right, next(buffers))) for key in keys)


def _product(key: Key, left: Tensor, right: Tensor, buffer: Tensor) -> Tensor:
    tile = _zeros(left.shape[1], right.shape[1], buffer)
    add_rows(tile, key, left, right)
    return tile


def _tile_in_parts(rows: LoggedRows, spans: list[slice], key: Key, buffer: Tensor) -> Tensor:
    """The same, super-panel by super-panel, where memory does not hold all draws of two tile rows."""
    i, j = key
    tile = _zeros(spans[i].stop - spans[i].start, spans[j].stop - spans[j].start, buffer)
    for part in range(len(rows.parts)):
        left = rows.read(part, spans[i])
        add_rows(tile, key, left, left if i == j else rows.read(part, spans[j]))
    return tile


def _zeros(a: int, b: int, buffer: Tensor) -> Tensor:
    return buffer[: a * b].view(a, b).zero_()


def committed_tiles(store: Path, *, whole: bool = True) -> dict[Key, Digest | None]:
    """The tiles that are durable, by the log of a process alone and those of ranks, with what each was (if known).

    Args:
        whole: read each of them; else only its end, where another process has read them all just now.
    """
    found: dict[Key, Digest | None] = {}
    for log in sorted(store.glob("tiles*.jsonl")):
        for number, line in enumerate(read_log(log, sealed=False)[0], 1):
            try:
                (i, j), written = (line["tile"], line["digest"]) if isinstance(line, dict) else (line, None)
                found[int(i), int(j)] = None if written is None else (int(written[0]), int(written[1]))
            except (KeyError, TypeError, ValueError, IndexError) as error:
                raise StoreError(f"{log.name} of {str(store)!r}, line {number}, names no tile") from error
    is_there = _is_whole if whole else _ends_as_written
    return {key: written for key, written in found.items() if is_there(chunk_path(store, key), written)}


def _ends_as_written(file: Path, written: Digest | None) -> bool:
    return file.exists() and (written is None or digest_of_chunk(file) == written)


def _is_whole(file: Path, written: Digest | None) -> bool:
    """Whether a tile need not be made again: every byte of it is what was written."""
    if not _ends_as_written(file, written):
        return False
    try:
        content = memoryview(read_buffer(file, file.stat().st_size))
    except StoreError:  # a disk that cannot read it
        return False
    found, end = digest(content[:-CRC_BYTES]), int.from_bytes(content[-CRC_BYTES:], "little")
    return found[0] > 0 and found[1] == end and written in (None, found)


def _line(key: Key, written: Digest | None) -> dict[str, Any]:
    return {"tile": key, "digest": written}


def prepare_tiles(store: Path, num_samples: int, side: int, dtype: str) -> dict[Key, Digest | None]:
    """Make the array of tiles, unless it holds some; returns those, gathered into one log without torn lines."""
    done = committed_tiles(store)
    if not done:
        create_tiles(store, num_samples, side, dtype, compressed=True)
        sync_tree(store / "tiles")
        sync(store)
    LineLog.begin(store / DONE, [_line(key, done[key]) for key in sorted(done)])
    for log in store.glob("tiles-*.jsonl"):
        log.unlink()
    return done


class TileWriter:
    """Compresses and writes tiles in a thread of its own, one while the next is made, each committed once durable.

    A commit is a line of `tiles.jsonl`; what is not followed by its line is made and written again on resuming.

    Args:
        name: of this process's log. Beside `tiles.jsonl`, it is one that `prepare_tiles` has let begin.
    """

    def __init__(self, store: Path, num_samples: int, side: int, dtype: str, name: str = DONE) -> None:
        alone = name == DONE
        self.done = prepare_tiles(store, num_samples, side, dtype) if alone else committed_tiles(store, whole=False)
        own = [_line(key, self.done[key]) for key in sorted(self.done)] if alone else []
        self._log = LineLog.after(store / name, own)
        self._array = Chunks.open(store, "tiles")
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="lossk-tiles")
        self._writing: Future[None] | None = None

    def known(self) -> dict[str, Digest]:
        """The digests of the files of all tiles that are done."""
        return {self._array.key(key): written for key, written in self.done.items() if written is not None}

    def put(self, key: Key, tile: Tensor) -> None:
        """Have a finished tile written; raises what went wrong with the one before."""
        self._wait()
        self._writing = self._pool.submit(self._write, key, tile)

    def _write(self, key: Key, tile: Tensor) -> None:
        self.done[key] = self._array.write(key, tile.numpy())
        # Gigabytes that nobody reads soon: memory that they kept would be new to the process, page by page, where the
        # next tile can have the same again (on a virtual machine several times cheaper); in a container it counts, too.
        forget(self._array.file(key))
        self._log.append([_line(key, self.done[key])])

    def _wait(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def __enter__(self) -> TileWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._wait()
        finally:
            self._pool.shutdown()
