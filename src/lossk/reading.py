"""Reading a caller's data once, in a fixed order, into resident tensors."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
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

from lossk.data import Samples, leaves, map_tensors

READ_BATCH = 256


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
