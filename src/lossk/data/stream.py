"""Samples that are read again at every pass, by the loader's own `collate_fn` and workers, and never held."""

from __future__ import annotations

import dataclasses
import hashlib
import pickle
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lossk.ambient import usual_modes
from lossk.data.data import Samples, few_of
from lossk.data.loaders import READ_BATCH, Reader, no_word_of_workers
from lossk.data.trees import Collated, children, leaves, map_tensors
from lossk.timings import Progress


@dataclass(frozen=True)
class Stream(Samples):
    """Samples of a map-style dataset, read at every pass: in order by the loader's workers, else in this process."""

    loader: Any = field(default=None, repr=False)
    first: int = 0  # of the dataset
    seconds: float = 0.0  # of a pass, when all were read the first time
    digest: str = ""
    plain: bool = True  # batches are trees of tensors, a row for each sample
    change: Any = field(default=None, repr=False, compare=False)  # what is done to each tensor of a batch
    _loaders: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __getitem__(self, index: slice | Tensor) -> Any:
        return self._as_given(self.held(index), self._count(index))

    def held(self, index: slice | Tensor) -> Any:
        """Some samples as the loader collates them."""
        rows = range(len(self))[index] if isinstance(index, slice) else index.tolist()
        dataset, rows = self.loader.dataset, [self.first + row for row in rows]
        with usual_modes(), torch.device("cpu"):
            many = getattr(dataset, "__getitems__", None)
            return self.loader.collate_fn(many(rows) if callable(many) else [dataset[row] for row in rows])

    def _count(self, index: slice | Tensor) -> int:
        return len(range(len(self))[index]) if isinstance(index, slice) else len(index)

    def _as_given(self, batch: Any, count: int) -> Any:
        if not self.plain:
            return Collated(_moved(batch, self.device), count)
        return self._given(map_tensors(self.change or (lambda t: t), batch))

    def batches(self, size: int) -> Iterator[tuple[int, Any]]:
        """(first sample, batch) of all samples in order, the next ones being read meanwhile by the loader's workers."""
        if self.loader.num_workers == 0:
            yield from ((start, self[start : start + size]) for start in range(0, len(self), size))
            return
        if size not in self._loaders:
            self._loaders[size] = _in_order(self.loader, range(self.first, self.first + len(self)), size)
        start = 0
        for batch in self._loaders[size]:
            count = min(size, len(self) - start)
            yield start, self._as_given(batch, count)
            start += count

    def pieces(self) -> Iterator[tuple[int, Any]]:
        """(first sample, batch) of all samples, as they are given."""
        yield from self.batches(READ_BATCH)

    def placed(self, change: Callable[[Tensor], Tensor], device: torch.device, side: Any) -> Samples:
        """With every tensor of each batch changed, or a batch of another form moved to the device."""
        return dataclasses.replace(self, change=change, device=device)

    def cut(self, span: slice) -> Samples:
        """Some of them, consecutive."""
        start, stop, _ = span.indices(len(self))
        return dataclasses.replace(self, first=self.first + start, num_samples=stop - start)

    @property
    def nbytes(self) -> int:
        return 0

    def fingerprint(self) -> str:
        """A digest of all samples, taken when they were first read."""
        return self.digest


def _in_order(loader: DataLoader, rows: range, size: int) -> DataLoader:
    """A loader of these rows, whose workers, if any, stay from pass to pass."""
    settings: dict[str, Any] = {"batch_size": size, "sampler": rows, "collate_fn": loader.collate_fn}
    if loader.num_workers > 0:
        names = ("num_workers", "worker_init_fn", "timeout", "prefetch_factor", "multiprocessing_context")
        settings |= {name: getattr(loader, name) for name in names} | {"persistent_workers": True}
    with no_word_of_workers():
        return DataLoader(loader.dataset, generator=torch.Generator(), **settings)  # not the global stream


def stream_of(reader: Reader, name: str, bar: Progress) -> Stream:
    """Read a dataset once, to know it again, and stream it from then on.

    Raises:
        TypeError: a loader that is not read in the order of a map-style dataset.
        ValueError: samples that are others when they are read again, or not finite; or none.
    """
    loader = reader.loader
    if reader.num_batches is None or loader.batch_size is None or reader.total is None:
        raise TypeError(
            f"{name} must be a map-style dataset, or a loader that batches all of one, for data='stream': its samples "
            "are read again, in any order; data='spool' reads them once"
        )
    if reader.total == 0:
        raise ValueError(f"{name} must hold at least one sample, got none")
    stream = Stream(None, reader.total, loader=loader)
    _check_repeats(stream, name)
    stream = dataclasses.replace(stream, plain=_is_plain(stream.held(slice(0, 2)), min(2, reader.total)))
    digest, start = hashlib.blake2b(digest_size=16), time.perf_counter()
    bar.start(reader.total, what=f"reading {name}", unit=" samples", stays=False)
    try:
        for first, batch in stream.pieces():
            _note(digest, batch, f"{name}: batch of sample {first}")
            bar.update(min(READ_BATCH, reader.total - first))
    finally:
        bar.stop()
    stream._loaders.clear()
    return dataclasses.replace(stream, digest=digest.hexdigest(), seconds=time.perf_counter() - start)


def _check_repeats(stream: Stream, name: str) -> None:
    for sample in few_of(stream).tolist():
        first, again = hashlib.blake2b(), hashlib.blake2b()
        for digest in (first, again):
            extend(digest, stream.loader.dataset[sample])
        if first.digest() != again.digest():
            raise ValueError(
                f"{name} must give the same sample whenever it is read, for data='stream', but sample {sample} differs "
                "from one reading to the next (random augmentation?); data='spool' reads each once"
            )


def _is_plain(batch: Any, count: int) -> bool:
    """Whether a batch is a tree of tensors with a row for each sample."""
    if isinstance(batch, Tensor):
        return not batch.is_nested and batch.layout == torch.strided and batch.ndim > 0 and len(batch) == count
    parts = children(batch)
    return bool(parts) and all(_is_plain(part, count) for part in (parts or {}).values())


def _note(digest: Any, batch: Any, where: str) -> None:
    if isinstance(batch, Collated):
        extend(digest, batch.batch)
        return
    for tensor in leaves(batch):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{where} must hold finite numbers only")
    extend(digest, batch)


def extend(digest: Any, item: Any) -> None:
    """Digest an item of any form: numbers by their bytes, an object by its attributes, the rest as pickle has it."""
    if isinstance(item, Tensor) and item.is_nested:
        item = list(item.unbind())
    if isinstance(item, Tensor) and item.layout == torch.strided:
        digest.update(f"{item.dtype}{list(item.shape)}".encode())
        digest.update(item.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return
    if hasattr(item, "__array_interface__"):  # an array, or a picture
        item = np.asarray(item)
    if isinstance(item, np.ndarray) and item.dtype.kind in "biufc":
        digest.update(f"{item.dtype}{list(item.shape)}{np.ascontiguousarray(item).tobytes()!r}".encode())
        return
    parts = children(item)
    if parts is None and hasattr(item, "__dict__") and not isinstance(item, Tensor | type):
        parts = dict(vars(item))
    if parts is None:
        try:
            digest.update(pickle.dumps(item))
        except Exception as error:
            raise TypeError(f"data='stream' must compare samples, which a {type(item).__name__} prevents") from error
        return
    digest.update(f"{type(item).__name__}{len(parts)}".encode())
    for key, value in parts.items():
        digest.update(repr(key).encode())
        extend(digest, value)


def _moved(batch: Any, device: torch.device | None) -> Any:
    """A batch of any form on a device: by its own `to`, or tensor by tensor."""
    if device is None or device.type == "cpu":
        return batch
    return batch.to(device) if hasattr(batch, "to") else map_tensors(lambda t: t.to(device), batch)
