"""Batches written one after the other into one tensor per part of a sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lossk.available import gigabytes
from lossk.data.accepted import as_tensors
from lossk.data.padding import Filling, Padding, Sizes, inner, spelled
from lossk.data.room import Room
from lossk.data.spool import PIECE, Spool, pieces
from lossk.data.trees import Path, flat, map_tensors

LOOK_AFTER = 2**24  # bytes read until the room is looked at again

Form = tuple[torch.dtype, torch.device, int]  # of a part of a batch, whatever the lengths: also its dimensions


class Columns:
    """The samples read so far.

    Each batch is copied at once, so that a worker's shared memory is free again, and nothing of the caller's is held.

    Args:
        name: of the public argument, for messages.
        total: of samples, as the data promise it; None if nobody knows.
        filling: what samples of different lengths are padded with; None refuses them.
    """

    def __init__(self, name: str, room: Room, total: int | None, filling: Filling | None = None) -> None:
        self.name, self.room, self.total, self.filling = name, room, total, filling
        self.rows = self.batches = 0
        self._first: Any = None
        self._form: dict[Path, Form] = {}
        self._columns: dict[Path, Column] = {}
        self._counts: list[int] = []  # samples of each batch
        self.spool: Spool | None = None  # of the files that samples lie in, if not in memory
        self._counted = 0  # bytes that the room has been told of
        self._looked_at = 0  # bytes that were read when the room was looked at

    @property
    def nbytes(self) -> int:
        """Of the samples read so far, in host memory or files."""
        return sum(self.rows * column.bytes_each for column in self._columns.values() if column.on_host)

    def add(self, batch: Any) -> int:
        """Append a batch; how many samples it holds.

        Raises:
            TypeError, ValueError: it holds something else than tensors, or another form than the first.
            MemoryError: no more can be held.
        """
        tree = as_tensors(batch, f"{self.name}: batch {self.batches}", self.room)
        parts = dict(flat(tree))
        count = self._check(parts)
        if self.batches == 0:
            self._first, self._form = tree, {path: _form(part) for path, part in parts.items()}
            self._columns = {path: Column(part) for path, part in parts.items()}
        if self.filling is not None:
            self.filling.look(parts)
        self._reserve(parts, count)
        for path, part in parts.items():
            self._columns[path].write(self.rows, part, self._left, self.spool)
        self._counts.append(count)
        self.rows, self.batches = self.rows + count, self.batches + 1
        held = 0 if self.spool is not None else self.nbytes
        self.room.read += held - self._counted
        self._counted = held
        return count

    def tree(self) -> tuple[Any, Padding | None]:
        """All samples, in the form of a batch; and what was filled in, if anything."""
        own, values = {}, {}
        for path, column in self._columns.items():
            if self.filling is not None and column.ragged:
                values[path] = self.filling.value(path, column.tensor)
                own[path] = column.fill(self._counts, values[path], self._left, self.spool)
        tensors = (column.only(self.rows, self.spool) for column in self._columns.values())
        tree = map_tensors(lambda _: next(tensors), self._first)
        return tree, Padding(own, self._left, values) if own else None

    @property
    def _left(self) -> bool:
        return self.filling is not None and self.filling.left

    def _check(self, parts: Mapping[Path, Tensor]) -> int:
        for path, part in parts.items():
            if part.ndim == 0:
                raise ValueError(f"{self._where(path)} must have the sample as its first dimension, got a 0-d tensor")
        counts = sorted({len(part) for part in parts.values()})
        if not counts:
            raise ValueError(f"{self.name}: batch {self.batches} must hold at least one tensor, got none")
        if len(counts) > 1:
            raise ValueError(
                f"{self.name}: batch {self.batches}: all tensors must have the same number of samples, got {counts}"
            )
        if self.batches > 0:
            self._check_form(parts)
        return counts[0]

    def _check_form(self, parts: Mapping[Path, Tensor]) -> None:
        if parts.keys() != self._form.keys():
            raise ValueError(
                f"{self.name}: batches must all have the same structure, got {_names(parts)} in batch {self.batches} "
                f"after {_names(self._form)}"
            )
        for path, part in parts.items():
            first, found, before = self._form[path], list(part.shape[1:]), list(self._columns[path].sizes)
            if first[2] != part.ndim or (self.filling is None and found != before):
                raise ValueError(
                    f"{self.name}: samples must have one shape in every batch, got {found} at {self._where(path)} "
                    f"after {before}; pad to a fixed length in collate_fn"
                )
            if first != _form(part):
                raise ValueError(
                    f"{self.name}: samples must have one dtype and device in every batch, got {part.dtype} on "
                    f"{part.device} at {self._where(path)} after {first[0]} on {first[1]}"
                )

    def _where(self, path: Path) -> str:
        return f"{self.name}: batch {self.batches}{spelled(path)}"

    def _reserve(self, parts: Mapping[Path, Tensor], count: int) -> None:
        """Make room for a batch, or say that there is none."""
        sizes = {path: self._columns[path].with_room_for(part) for path, part in parts.items()}
        longer = any(sizes[path] != column.sizes for path, column in self._columns.items())
        capacity = min(column.capacity for column in self._columns.values())
        each = sum(bytes_of(sizes[path], part) for path, part in parts.items() if part.device.type == "cpu")
        size = (self.rows + count) * each
        if self.rows + count <= capacity and not longer:
            if size - self._looked_at > LOOK_AFTER:
                self.room.check(count * each, self._so_far())
                self._looked_at = size
            return
        promised = self.total or 0
        if self.rows + count > capacity:
            capacity = promised if self.rows + count <= promised else max(self.rows + count, self.rows * 3 // 2)
        known = max(promised, self.rows + count) * each if promised else None
        if self.spool is None and self.room.spools(known):
            self.spool = self.room.spool
        if self.spool is not None:
            self._check_disk(max(capacity * each, known or 0))
        elif promised > count > 0 and (self.batches == 0 or longer):
            takes, read = f"{promised:,} samples, which take {gigabytes(promised * each)}", self.rows + count
            self.room.check(promised * each - self._counted, f"{self.name} has {takes} ({read:,} are read)")
        else:
            self.room.check(size, f"{self._so_far()} (twice that while room for more is made)")
        for path, column in self._columns.items():
            column.grow(capacity, sizes[path], self.rows, self._left, self.spool)

    def _check_disk(self, size: int) -> None:
        assert self.spool is not None
        if size > self.spool.free:
            raise MemoryError(
                f"{self._so_far()}: {gigabytes(size)} do not fit into files in {self.spool.folder}, where "
                f"{gigabytes(self.spool.free)} may be taken; give fewer samples, or set TMPDIR to a larger disk"
            )

    def _so_far(self) -> str:
        length = "has no known length and" if self.total is None else f"has {self.total:,} samples, it says, and"
        return f"{self.name} {length} has not ended after {self.rows:,} samples, {gigabytes(self.nbytes)}"


class Column:
    """One part of all samples, [capacity, *sizes].

    Args:
        part: of the first batch.
    """

    def __init__(self, part: Tensor) -> None:
        self.sizes: Sizes = tuple(part.shape[1:])
        self.tensor = torch.empty((0, *self.sizes), dtype=part.dtype, device=part.device)
        self._own: list[Sizes] = []  # of each batch

    @property
    def capacity(self) -> int:
        return len(self.tensor)

    @property
    def on_host(self) -> bool:
        return self.tensor.device.type == "cpu"

    @property
    def bytes_each(self) -> int:
        """Of a sample."""
        return bytes_of(self.sizes, self.tensor)

    @property
    def ragged(self) -> bool:
        """Whether batches had different lengths."""
        return len(set(self._own)) > 1

    def with_room_for(self, part: Tensor) -> Sizes:
        """The sizes of a sample once this part of a batch is in."""
        return tuple(max(pair) for pair in zip(self.sizes, part.shape[1:], strict=True))

    def grow(self, capacity: int, sizes: Sizes, rows: int, left: bool, spool: Spool | None) -> None:
        """Make room for more or longer samples, `rows` being there; in a file of the spool, if there is one."""
        if spool is not None and self.on_host:
            grown = spool.empty((capacity, *sizes), self.tensor.dtype)
        else:
            grown = torch.empty((capacity, *sizes), dtype=self.tensor.dtype, device=self.tensor.device)
        for span in pieces(self.tensor[:rows]):
            grown[span][inner(self.sizes, sizes, left)] = self.tensor[span]
            if spool is not None:
                spool.touched(2 * PIECE)
        self.tensor, self.sizes = grown, sizes

    def write(self, rows: int, part: Tensor, left: bool, spool: Spool | None) -> None:
        """Put a batch's part behind the rows that are there."""
        own = tuple(part.shape[1:])
        self._own.append(own)
        self.tensor[rows : rows + len(part)][inner(own, self.sizes, left)] = part
        if spool is not None:
            spool.touched(part.nbytes)

    def fill(self, counts: list[int], value: float, left: bool, spool: Spool | None) -> Tensor:
        """Fill up the shorter samples; [N, d] int32, the sizes that each had."""
        start = 0
        for count, own in zip(counts, self._own, strict=True):
            if own != self.sizes:
                rows = self.tensor[start : start + count]
                kept = rows[inner(own, self.sizes, left)].clone()
                rows.fill_(value)
                rows[inner(own, self.sizes, left)] = kept
                if spool is not None:
                    spool.touched(rows.nbytes)
            start += count
        sizes = torch.tensor(self._own, dtype=torch.int32, device="cpu")
        return sizes.repeat_interleave(torch.tensor(counts, dtype=torch.int64, device="cpu"), dim=0)

    def only(self, rows: int, spool: Spool | None) -> Tensor:
        """The tensor, without room for more than these."""
        few = self.tensor[:rows]
        return few if len(self.tensor) == rows or (spool is not None and self.on_host) else few.clone()


def bytes_of(sizes: Sizes, part: Tensor) -> int:
    """Of a sample of these sizes."""
    count = part.element_size()
    for size in sizes:
        count *= size
    return count


def _form(part: Tensor) -> Form:
    return part.dtype, part.device, part.ndim


def _names(paths: Mapping[Path, Any]) -> str:
    return ", ".join(spelled(path) or "a tensor" for path in paths)
