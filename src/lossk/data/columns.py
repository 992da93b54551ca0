"""Batches written one after the other into one tensor per part of a sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lossk.available import gigabytes
from lossk.data.accepted import as_tensors
from lossk.data.room import Room
from lossk.data.trees import Path, flat, map_tensors

LOOK_AFTER = 2**24  # bytes read until the room is looked at again

Form = dict[Path, tuple[torch.dtype, torch.device, tuple[int, ...]]]


class Columns:
    """The samples read so far.

    Each batch is copied at once, so that a worker's shared memory is free again, and nothing of the caller's is held.

    Args:
        name: of the public argument, for messages.
        total: of samples, as the data promise it; None if nobody knows.
    """

    def __init__(self, name: str, room: Room, total: int | None) -> None:
        self.name, self.room, self.total = name, room, total
        self.rows = self.nbytes = self.batches = 0
        self._first: Any = None
        self._form: Form = {}
        self._columns: dict[Path, Tensor] = {}
        self._looked_at = 0  # bytes that were read when the room was looked at

    def add(self, batch: Any) -> int:
        """Append a batch; how many samples it holds.

        Raises:
            TypeError, ValueError: it holds something else than tensors, or another form than the first.
            MemoryError: no more can be held.
        """
        tree = as_tensors(batch, f"{self.name}: batch {self.batches}", self.room)
        parts = dict(flat(tree))
        count = self._check(parts)
        size = sum(part.nbytes for part in parts.values() if part.device.type == "cpu")
        if self.batches == 0:
            self._first, self._form = tree, {path: _form(part) for path, part in parts.items()}
        self._reserve(parts, count, size)
        for path, part in parts.items():
            self._columns[path][self.rows : self.rows + count].copy_(part)
        self.rows, self.nbytes, self.batches = self.rows + count, self.nbytes + size, self.batches + 1
        self.room.read += size
        return count

    def tree(self) -> Any:
        """All samples, in the form of a batch."""
        for path, column in self._columns.items():
            if len(column) > self.rows:  # fewer than promised, or than room was made for
                self._columns[path] = column[: self.rows].clone()
        columns = iter(self._columns.values())
        return map_tensors(lambda _: next(columns), self._first)

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
        if self.batches == 0:
            return counts[0]
        if parts.keys() != self._form.keys():
            raise ValueError(
                f"{self.name}: batches must all have the same structure, got {_names(parts)} in batch {self.batches} "
                f"after {_names(self._form)}"
            )
        for path, part in parts.items():
            dtype, device, shape = _form(part)
            if self._form[path][2] != shape:
                raise ValueError(
                    f"{self.name}: samples must have one shape in every batch, got {list(shape)} at "
                    f"{self._where(path)} after {list(self._form[path][2])}; pad to a fixed length in collate_fn"
                )
            if self._form[path][:2] != (dtype, device):
                raise ValueError(
                    f"{self.name}: samples must have one dtype and device in every batch, got {dtype} on {device} at "
                    f"{self._where(path)} after {self._form[path][0]} on {self._form[path][1]}"
                )
        return counts[0]

    def _where(self, path: Path) -> str:
        return f"{self.name}: batch {self.batches}" + "".join(f"[{key!r}]" for key in path)

    def _reserve(self, parts: Mapping[Path, Tensor], count: int, size: int) -> None:
        """Make room for a batch, or say that there is none."""
        capacity = max((len(column) for column in self._columns.values()), default=0)
        if self.rows + count <= capacity:
            if self.nbytes - self._looked_at > LOOK_AFTER:
                self.room.check(size, self._so_far())
                self._looked_at = self.nbytes
            return
        promised = self.total or 0
        capacity = promised if self.rows + count <= promised else max(self.rows + count, self.rows * 3 // 2)
        if self.batches == 0 and promised > count > 0:
            expected = promised * size // count
            self.room.check(
                expected, f"{self.name} has {promised:,} samples, which take {gigabytes(expected)} ({count:,} are read)"
            )
        else:
            self.room.check(self.nbytes + size, f"{self._so_far()} (twice that while room for more is made)")
        for path, part in parts.items():
            grown = torch.empty((capacity, *part.shape[1:]), dtype=part.dtype, device=part.device)
            if path in self._columns:
                grown[: self.rows].copy_(self._columns[path][: self.rows])
            self._columns[path] = grown

    def _so_far(self) -> str:
        length = "has no known length and" if self.total is None else f"has {self.total:,} samples, it says, and"
        return f"{self.name} {length} has not ended after {self.rows:,} samples, {gigabytes(self.nbytes)}"


def _form(part: Tensor) -> tuple[torch.dtype, torch.device, tuple[int, ...]]:
    return part.dtype, part.device, tuple(part.shape[1:])


def _names(paths: Mapping[Path, Any]) -> str:
    return ", ".join("".join(f"[{key!r}]" for key in path) or "a tensor" for path in paths)
