"""How a DataLoader or Dataset is read: in which order, by which loader, and how many samples it promises."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler

READ_BATCH = 256
AS_GIVEN = "it is read once, and row i of the kernel is the i-th sample it gives"


@dataclass(frozen=True)
class Reader:
    """A loader to read once, from its beginning to its end.

    Attributes:
        total: samples, as the data promise it; None if nobody knows.
        num_batches: of a dataset that is read in its own order, else None.
    """

    loader: DataLoader
    total: int | None
    num_batches: int | None = None

    def describe(self, batch: int) -> str:
        """A batch, for messages."""
        size = self.loader.batch_size
        if self.num_batches is None:
            return f"batch {batch}"
        if size is None or self.total is None:
            return f"item {batch} of its dataset"
        first, last = batch * size, min((batch + 1) * size, self.total) - 1
        return f"sample {first}" if first == last else f"batch {batch} (samples {first} to {last} of its dataset)"


def reader_of(source: DataLoader | Dataset, name: str) -> Reader:
    """How to read a loader or a dataset.

    A loader is rebuilt: in dataset order if its sampler is torch's own over the whole dataset, else in its own order.
    What bears on reading is kept (collate_fn; the workers, their context, initialization, prefetching and timeout).
    Left out are pinned memory, batches out of order, and workers that persist: a caller who is in the middle of a pass
    over them would lose it. A loader that iterates in a way of its own is read as it is.

    Raises:
        TypeError: a map-style dataset without a length.
    """
    loader = source if isinstance(source, DataLoader) else _quietly(source, batch_size=READ_BATCH)
    total, plain = length_of(loader.dataset), iterates_plainly(loader)
    if isinstance(loader.dataset, IterableDataset):
        order = {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
        return Reader(_rebuilt(loader, **order) if plain else loader, total)
    if not plain:
        _warn(f"{name} iterates in a way of its own: {AS_GIVEN}")
        return Reader(loader, None)
    if total is None:
        kind = type(loader.dataset).__name__
        raise TypeError(f"{name}: a map-style dataset must have a length (__len__), got a {kind} without")
    if not _orders_all(loader, total):
        _warn(f"{name} has a sampler of its own: {AS_GIVEN}")
        return _in_own_order(loader)
    if type(loader.sampler) is RandomSampler:
        _warn(
            f"{name} shuffles: its {total} samples are read in dataset order, so that row i of the kernel is dataset[i]"
        )
    size = loader.batch_size
    ordered = _rebuilt(loader, batch_size=size, sampler=SequentialSampler(loader.dataset))  # type: ignore[arg-type]
    return Reader(ordered, total if size else None, math.ceil(total / (size or 1)))


def iterates_plainly(loader: DataLoader) -> bool:
    """Whether going through the loader is torch's code, so that another loader of its parts gives the same."""
    kind = type(loader)
    return kind.__iter__ is DataLoader.__iter__ and kind._get_iterator is DataLoader._get_iterator


def length_of(item: Any) -> int | None:
    """Its length, or None if it has none."""
    try:
        return len(item)
    except Exception:  # a caller's __len__ may raise anything
        return None


def _orders_all(loader: DataLoader, total: int) -> bool:
    """Whether torch's own sampler gives every sample of the dataset, in order or shuffled."""
    batches, sampler = loader.batch_sampler, loader.sampler
    if batches is not None and (type(batches) is not BatchSampler or batches.sampler is not sampler):
        return False
    return type(sampler) in (RandomSampler, SequentialSampler) and length_of(sampler.data_source) == total  # type: ignore[attr-defined]


def _in_own_order(loader: DataLoader) -> Reader:
    if loader.batch_size is not None:
        order = {"batch_size": loader.batch_size, "sampler": loader.sampler, "drop_last": loader.drop_last}
        total = length_of(loader.sampler)
        if total is not None and loader.drop_last:
            total -= total % loader.batch_size
        return Reader(_rebuilt(loader, **order), total)
    if loader.batch_sampler is not None:
        return Reader(_rebuilt(loader, batch_sampler=loader.batch_sampler), None)
    return Reader(_rebuilt(loader, batch_size=None, sampler=loader.sampler), None)


def _rebuilt(loader: DataLoader, **order: Any) -> DataLoader:
    kept: dict[str, Any] = {"collate_fn": loader.collate_fn, "generator": loader.generator}
    if loader.num_workers > 0:
        names = ("num_workers", "worker_init_fn", "timeout", "prefetch_factor", "multiprocessing_context")
        kept |= {name: getattr(loader, name) for name in names}
    return _quietly(loader.dataset, **kept, **order)


def _quietly(dataset: Any, **settings: Any) -> DataLoader:
    with no_word_of_workers():
        return DataLoader(dataset, **settings)


@contextmanager
def no_word_of_workers() -> Iterator[None]:
    """Without torch's warning that many workers are slow, which the caller's own loader has given already."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
        yield


def _warn(text: str) -> None:
    warnings.warn(text, UserWarning, stacklevel=5)
