"""Reading a caller's data once, in a fixed order, into resident tensors."""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
)

from lossk.device import ahead

READ_BATCH = 256
FEW = 8  # samples that a check looks at
HALVES = (torch.float16, torch.bfloat16)

Transform = Callable[[Any], Any]  # a batch's inputs, as they are held, to what the model is given


def widen(tensor: Tensor) -> Tensor:
    """Half precision as float32."""
    return tensor.float() if tensor.dtype in HALVES else tensor


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
    copied: bool = True  # a batch is a copy, never a view: what it is given to may write into it
    _views: dict[int, list[tuple[int, Any]]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: slice | Tensor) -> Any:
        copied = self.copied and isinstance(index, slice)  # indexing by a tensor copies anyway
        batch = map_tensors(lambda t: widen(self._moved(t[index].clone() if copied else t[index])), self.tree)
        if self.transform is None:
            return batch
        inputs, targets = batch
        return self.transform(inputs), targets

    def _moved(self, part: Tensor) -> Tensor:
        return part if self.device is None else part.to(self.device, non_blocking=True)

    def batches(self, size: int) -> Iterator[tuple[int, Any]]:
        """(first sample, batch) of all samples in order, `size` at a time.

        Batches that are nothing but views are made once and kept: a probe passes over the same ones at every draw.
        """
        starts = range(0, len(self), size)
        if self.device is not None:
            yield from ahead(starts, lambda start: (start, self[start : start + size]), _tensors_of, self.device)
            return
        if self.copied or self.transform is not None or any(t.dtype in HALVES for t in leaves(self.tree)):
            yield from ((start, self[start : start + size]) for start in starts)
            return
        if size not in self._views:
            self._views[size] = [(start, self[start : start + size]) for start in starts]
        yield from self._views[size]

    def cut(self, span: slice) -> Samples:
        """Some of them, consecutive, as views."""
        start, stop, _ = span.indices(len(self))
        tree = map_tensors(lambda t: t[start:stop], self.tree)
        return dataclasses.replace(self, tree=tree, num_samples=stop - start)

    def transformed(self, transform: Transform | None, name: str) -> Samples:
        """The same data with a transform, tried on one batch.

        Raises:
            ValueError: batches that are not (inputs, targets), or inputs that come out as something else than tensors
                of as many samples.
        """
        if transform is None:
            return self
        if not isinstance(self.tree, tuple) or len(self.tree) != 2:
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
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        if self.transform is not None:  # a function has no digest; what it makes of a few samples has
            few = Samples(self[: min(8, len(self))], min(8, len(self)))
            digest.update(few.fingerprint().encode())
        return digest.hexdigest()


def _tensors_of(batch: tuple[int, Any]) -> list[Tensor]:
    return leaves(batch[1])


def few_of(samples: Samples, count: int = FEW) -> Tensor:
    """[k] int64: samples spread evenly, the first and the last among them."""
    last = torch.linspace(0, len(samples) - 1, min(count, len(samples)), dtype=torch.float64, device="cpu")
    return last.round().long()


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Apply a function to every tensor of a tree of tuples, lists and mappings."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return {key: map_tensors(function, value) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        return tuple(map_tensors(function, value) for value in tree)
    raise TypeError(f"loader: batches must be made of tensors, got {type(tree).__name__}")


def leaves(tree: Any) -> list[Tensor]:
    """The tensors of a tree, in order."""
    if isinstance(tree, Tensor):
        return [tree]
    return [leaf for value in (tree.values() if isinstance(tree, Mapping) else tree) for leaf in leaves(value)]


def read_samples(source: Any, name: str = "loader") -> Samples:
    """Read every sample of `source` once.

    Args:
        source: a DataLoader, a Dataset, or a tuple (inputs, targets) of tensors or arrays. A shuffling DataLoader is
            read in dataset order; an iterable one, or one with a sampler of its own, is read once in the order it
            gives. Random augmentation is thereby drawn once and kept.
        name: the public argument, for messages.

    Raises:
        TypeError: not one of these, or samples that are not tensors.
        ValueError: empty, of unequal lengths, or holding a non-finite number.
    """
    tree = _read_tree(source, name)
    lengths = sorted({t.shape[0] if t.ndim else -1 for t in leaves(tree)})
    if not lengths or lengths[-1] <= 0:
        raise ValueError(f"{name} must hold at least one sample, got none")
    if len(lengths) > 1:
        raise ValueError(f"{name}: all tensors must have the same number of samples, got {lengths}")
    samples = Samples(tree, lengths[0])
    _check_finite(samples, name)
    return samples


def _read_tree(source: Any, name: str) -> Any:
    if isinstance(source, DataLoader):
        return _read_loader(source, name)
    if isinstance(source, IterableDataset):
        return _concatenate(DataLoader(source, batch_size=READ_BATCH), name)
    if isinstance(source, TensorDataset):
        return tuple(source.tensors)
    if isinstance(source, Dataset):
        return _concatenate(DataLoader(source, batch_size=READ_BATCH), name)
    if isinstance(source, Mapping) or (isinstance(source, tuple | list) and len(source) > 0):
        return map_tensors(lambda t: t, _as_tensors(source, name))
    raise TypeError(
        f"{name} must be a DataLoader, a Dataset or a tuple (inputs, targets) of tensors, got {type(source).__name__}"
    )


def _as_tensors(tree: Any, name: str) -> Any:
    if isinstance(tree, Tensor):
        return tree.detach()
    if isinstance(tree, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(tree))
    if isinstance(tree, Mapping):
        return {key: _as_tensors(value, name) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        return tuple(_as_tensors(value, name) for value in tree)
    raise TypeError(f"{name} must hold tensors or arrays, got {type(tree).__name__}")


def _read_loader(loader: DataLoader, name: str) -> Any:
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset):
        return _concatenate(loader, name)
    sampler = loader.sampler if loader.batch_size is not None else None
    if isinstance(sampler, RandomSampler):
        warnings.warn(
            f"{name} shuffles: its {len(dataset)} samples are read in dataset order, "  # type: ignore[arg-type]
            "so that row i of the kernel is dataset[i]",
            UserWarning,
            stacklevel=2,
        )
    elif not isinstance(sampler, SequentialSampler):
        warnings.warn(
            f"{name} has a sampler of its own: it is read once, and row i of the kernel is the i-th sample it gives",
            UserWarning,
            stacklevel=2,
        )
        return _concatenate(loader, name)
    if isinstance(dataset, TensorDataset) and loader.collate_fn is default_collate:
        return tuple(dataset.tensors)
    ordered = DataLoader(
        dataset,
        batch_size=loader.batch_size,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        worker_init_fn=loader.worker_init_fn,
        generator=loader.generator,
    )
    return _concatenate(ordered, name)


def _concatenate(batches: Iterable[Any], name: str) -> Any:
    # Reading may draw random numbers (worker seeds, augmentation); the caller's global stream stays where it was.
    with torch.random.fork_rng(devices=[]):
        read = [_as_tensors(batch, name) for batch in batches]
    if not read:
        raise ValueError(f"{name} must hold at least one sample, got none")
    columns = [leaves(batch) for batch in read]
    if len({len(column) for column in columns}) > 1:
        raise ValueError(f"{name}: batches must all have the same structure")
    joined = []
    for parts in zip(*columns, strict=True):
        shapes = {tuple(part.shape[1:]) for part in parts}
        if any(part.ndim == 0 for part in parts) or len(shapes) > 1:
            raise ValueError(
                f"{name}: samples must have one shape in every batch, got {sorted(map(list, shapes))[:4]}; "
                "pad to a fixed length in collate_fn"
            )
        joined.append(torch.cat(parts))
    remaining = iter(joined)
    return map_tensors(lambda _: next(remaining), read[0])


def _check_finite(samples: Samples, name: str) -> None:
    for tensor in leaves(samples.tree):
        if not tensor.is_floating_point():
            continue
        for start in range(0, len(samples), READ_BATCH):
            part = tensor[start : start + READ_BATCH]
            bad = (~torch.isfinite(part)).reshape(part.shape[0], -1).any(dim=1).nonzero()
            if bad.numel():
                raise ValueError(
                    f"{name} must hold finite numbers only; sample {start + int(bad[0])} has NaN or infinity"
                )
