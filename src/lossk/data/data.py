"""The samples of a data set, held as one batch."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lossk.data.padding import Padding
from lossk.data.spool import PIECE, Spool, pieces
from lossk.data.trees import leaves, map_tensors
from lossk.device import SideStream, ahead

FEW = 8  # samples that a check looks at
HALVES = (torch.float16, torch.bfloat16)

Transform = Callable[[Any], Any]  # a batch's inputs, as they are held, to what the model is given


def widen(tensor: Tensor) -> Tensor:
    """Half precision as float32."""
    return tensor.float() if tensor.dtype in HALVES else tensor


@dataclass(frozen=True)
class Along:
    """Numbers of each sample that are told whenever a batch is taken.

    Attributes:
        samples: the numbers, of as many samples.
        tell: is called with a batch and its numbers.
    """

    samples: Samples
    tell: Callable[[Any, Any], None] = field(compare=False)


@dataclass(frozen=True)
class Samples:
    """All samples of a data set as one batch: a tree of tensors whose first dimension is the sample.

    They are held as they came; a batch of them, `samples[index]`, is what the model is given: half-precision numbers
    widened to float32, and the inputs passed through `transform`.
    """

    tree: Any
    num_samples: int
    transform: Transform | None = None
    device: torch.device | None = None  # where batches are wanted, if the data are not held there
    side: SideStream | None = field(default=None, repr=False, compare=False)  # on which they are copied there
    copied: bool = True  # a batch is a copy, never a view: what it is given to may write into it
    padding: Padding | None = None  # of samples that came in different lengths
    spool: Spool | None = field(default=None, repr=False, compare=False)  # of the files that the tree may lie in
    along: Along | None = None
    _views: dict[int, list[tuple[int, Any]]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: slice | Tensor) -> Any:
        batch = self._given(map_tensors(lambda t: self._part(t, index), self.tree))
        if self.along is not None:
            self.along.tell(batch, self.along.samples.held(index))
        return batch

    def _part(self, tensor: Tensor, index: slice | Tensor) -> Tensor:
        if isinstance(index, Tensor):
            return tensor[index] if self.spool is None else self.spool.take(tensor, index)
        self._touch(index)
        return tensor[index].clone() if self.copied else tensor[index]

    def held(self, index: slice | Tensor) -> Any:
        """Some samples as they are held."""
        return map_tensors(
            lambda t: self._part(t, index.to(t.device) if isinstance(index, Tensor) else index), self.tree
        )

    def alone(self, sample: int) -> Any:
        """A batch of one sample, without the padding that it has among longer ones."""
        assert self.padding is not None
        return self._given(map_tensors(torch.clone, self.padding.alone(self.tree, sample)))

    def _given(self, tree: Any) -> Any:
        """A part of the tree as the model is given it."""
        batch = map_tensors(lambda t: widen(self._moved(t)), tree)
        if self.transform is None:
            return batch
        inputs, targets = batch
        return self.transform(inputs), targets

    def pieces(self) -> Iterator[tuple[int, Any]]:
        """(first sample, tree) of all samples: at once where they lie in memory, else a few megabytes a time."""
        if self.spool is None:
            yield 0, self.tree
            return
        step = max(1, len(self) * PIECE // max(self.nbytes, 1))
        for start in range(0, len(self), step):
            yield start, map_tensors(lambda t: t[start : start + step], self.tree)  # noqa: B023
            self._touch(slice(start, start + step))

    def _touch(self, index: slice) -> None:
        """Have the spool let pages go, now and then, of a tree in files of which these samples are read."""
        if self.spool is not None:
            start, stop, _ = index.indices(len(self))
            self.spool.touched(max(stop - start, 0) * self.nbytes // len(self))

    def _moved(self, part: Tensor) -> Tensor:
        return part if self.device is None else part.to(self.device, non_blocking=True)

    def batches(self, size: int) -> Iterator[tuple[int, Any]]:
        """(first sample, batch) of all samples in order, `size` at a time.

        Batches that are nothing but views are made once and kept: a probe passes over the same ones at every draw.
        """
        starts = range(0, len(self), size)
        if self.device is not None:
            yield from ahead(
                starts, lambda start: (start, self[start : start + size]), _tensors_of, self.device, self.side
            )
            return
        if (
            self.copied
            or self.along is not None
            or self.transform is not None
            or any(t.dtype in HALVES for t in leaves(self.tree))
        ):
            yield from ((start, self[start : start + size]) for start in starts)
            return
        if size not in self._views:
            self._views[size] = [(start, self[start : start + size]) for start in starts]
        for start, batch in self._views[size]:
            self._touch(slice(start, start + size))
            yield start, batch

    def cut(self, span: slice) -> Samples:
        """Some of them, consecutive, as views."""
        start, stop, _ = span.indices(len(self))
        tree = map_tensors(lambda t: t[start:stop], self.tree)
        along = self.along and dataclasses.replace(self.along, samples=self.along.samples.cut(span))
        return dataclasses.replace(self, tree=tree, num_samples=stop - start, padding=None, along=along)

    def placed(self, change: Callable[[Tensor], Tensor], device: torch.device, side: SideStream | None) -> Samples:
        """With every tensor changed, and batches copied to the device, if there is a stream for that."""
        tree = map_tensors(change, self.tree)
        return dataclasses.replace(self, tree=tree, device=None if side is None else device, side=side)

    def transformed(self, transform: Transform | None, name: str) -> Samples:
        """The same data with a transform, tried on one batch.

        Raises:
            ValueError: batches that are not (inputs, targets), or inputs that come out as something else than tensors
                of as many samples.
        """
        if transform is None:
            return self
        tree = self.held(slice(0, 1)) if self.tree is None else self.tree
        if not isinstance(tree, tuple | list) or len(tree) != 2:
            raise ValueError(f"transform needs batches (inputs, targets), got another form from {name}")
        samples = dataclasses.replace(self, transform=transform)
        few = samples[: min(2, len(self))][0]
        try:
            lengths = {len(t) for t in leaves(few)}
        except (TypeError, AttributeError):
            lengths = set()
        if lengths != {min(2, len(self))}:
            found = f"{list(few.shape)}" if isinstance(few, Tensor) else type(few).__name__
            raise ValueError(f"transform must return the batch's inputs as tensors of as many samples, got {found}")
        return samples

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in leaves(self.tree))

    def fingerprint(self) -> str:
        """A digest of the shapes and bytes, by which a resumed run knows its data again."""
        digest = hashlib.blake2b(digest_size=16)
        for tensor in leaves(self.tree):
            digest.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
            for span in pieces(tensor):
                digest.update(tensor[span].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
                self._touch(span)
        if self.transform is not None:  # a function has no digest; what it makes of a few samples has
            few = Samples(self[: min(8, len(self))], min(8, len(self)))
            digest.update(few.fingerprint().encode())
        return digest.hexdigest()


def _tensors_of(batch: tuple[int, Any]) -> list[Tensor]:
    return leaves(batch[1])


def few_of(samples: Samples, count: int = FEW) -> Tensor:
    """[k] int64: samples spread evenly, the first and the last among them."""
    return spread(len(samples), count)


def spread(total: int, count: int) -> Tensor:
    """[k] int64: at most `count` of the numbers below `total`, spread evenly from the first to the last."""
    numbers = torch.linspace(0, max(total - 1, 0), min(count, total), dtype=torch.float64, device="cpu")
    return numbers.round().long()
