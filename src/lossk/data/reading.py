"""Reading a caller's data once, in a fixed order, into resident tensors."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from lossk.ambient import usual_modes
from lossk.available import gigabytes
from lossk.data.accepted import as_tensors
from lossk.data.columns import Columns
from lossk.data.data import Samples
from lossk.data.generators import generators_kept
from lossk.data.loaders import AS_GIVEN, READ_BATCH, Reader, no_word_of_workers, reader_of
from lossk.data.padding import Filling
from lossk.data.room import Room
from lossk.data.stream import stream_of
from lossk.data.streams import streams_kept
from lossk.data.trees import leaves
from lossk.timings import Progress

_END = object()


def read_samples(
    source: Any, name: str = "loader", *, bar: Progress | None = None, room: Room | None = None, pads: bool = False
) -> Samples:
    """Read every sample of `source` once.

    Args:
        source: a DataLoader, a Dataset, or a tuple (inputs, targets) of tensors or arrays. A shuffling DataLoader is
            read in dataset order; an iterable one, or one with a sampler of its own, is read once in the order it
            gives. Random augmentation is thereby drawn once and kept. Global random streams, and the generators of
            loader, sampler and dataset, are afterwards where they were. Code of the caller's runs as in a plain
            script, whatever modes the call is made in: gradients enabled, no autocast, tensors made on the CPU.
        name: the public argument, for messages.
        bar: where progress is shown.
        room: how much may be read; None is what is free.
        pads: pad batches of different lengths to the longest, which the caller then proves (`Samples.padding`).

    Raises:
        TypeError: not one of these, or samples that are not dense tensors.
        ValueError: empty, of unequal lengths, or holding a non-finite number.
        MemoryError: more than there is room for.
        RuntimeError: the caller's own code failed; its error is the cause. A TypeError or ValueError keeps its type.
    """
    check_source(source, name)
    if isinstance(source, Samples):  # read already
        return source
    with streams_kept(), generators_kept(source), _plain_modes(source):
        filling = Filling(getattr(source, "collate_fn", None)) if pads else None
        if room is not None and room.streams and isinstance(source, DataLoader | Dataset):
            return stream_of(reader_of(source, name), name, bar or Progress(False))
        samples = _read(source, name, bar or Progress(False), room or Room(), filling)
        tree = samples.tree
        tensors = leaves(tree)
        if any(t.ndim == 0 for t in tensors):
            raise ValueError(f"{name}: every tensor must have the sample as its first dimension, got a 0-d tensor")
        lengths = sorted({len(t) for t in tensors})
        if not lengths or lengths[-1] <= 0:
            raise ValueError(f"{name} must hold at least one sample, got none")
        if len(lengths) > 1:
            raise ValueError(f"{name}: all tensors must have the same number of samples, got {lengths}")
        for start, part in samples.pieces():
            _check_finite(leaves(part), name, start)
        return samples


def check_source(source: Any, name: str) -> None:
    """Raise a TypeError for what cannot be read at all."""
    if isinstance(source, DataLoader | Dataset | Mapping | Samples):
        return
    got = f"got {type(source).__name__}"
    if isinstance(source, Iterator):
        got += ", which can be gone through only once: give the DataLoader or Dataset it comes from"
    elif type(source) is list and len(source) > 1 and all(isinstance(v, tuple | list | Mapping) for v in source):
        got += f" of {type(source[0]).__name__}s: of samples or batches make a DataLoader"
    elif isinstance(source, tuple | list) and len(source) > 0:
        return
    raise TypeError(f"{name} must be a DataLoader, a Dataset or a tuple (inputs, targets) of tensors, {got}")


def _read(source: Any, name: str, bar: Progress, room: Room, filling: Filling | None) -> Samples:
    if not isinstance(source, DataLoader | Dataset):
        return _as_one(as_tensors(source, name, room))
    reader = reader_of(source, name)
    dataset, collate = reader.loader.dataset, reader.loader.collate_fn
    if reader.num_batches is not None and collate is default_collate and _is_only_tensors(dataset):
        return _as_one(as_tensors(tuple(dataset.tensors), name, room))  # type: ignore[attr-defined]
    return _gather(reader, name, bar, Columns(name, room, reader.total, filling))


def _as_one(tree: Any) -> Samples:
    return Samples(tree, next((len(tensor) for tensor in leaves(tree) if tensor.ndim), 0))


def _is_only_tensors(dataset: Any) -> bool:
    """Whether it is a TensorDataset, and no subclass that makes something else of its tensors."""
    names = ("__getitem__", "__getitems__", "__len__")
    return isinstance(dataset, TensorDataset) and all(
        getattr(type(dataset), name, None) is getattr(TensorDataset, name, None) for name in names
    )


def _gather(reader: Reader, name: str, bar: Progress, columns: Columns) -> Samples:
    known = reader.total is not None or reader.num_batches is not None
    length = "" if known else ", of no known length, until it ends"
    bar.start(reader.total, what=f"reading {name}{length}", unit=" samples", stays=False)
    try:
        with contextlib.closing(_batches(reader, name)) as batches:
            for batch in batches:
                bar.update(columns.add(batch), gigabytes(columns.nbytes))
    finally:
        bar.stop()
    if columns.batches == 0:
        raise ValueError(f"{name} must hold at least one sample, got none")
    if reader.num_batches not in (None, columns.batches):
        raise ValueError(
            f"{name} must not end before its dataset, got {columns.batches} of {reader.num_batches} batches; does its "
            "dataset raise StopIteration?"
        )
    if reader.num_batches is not None and reader.total not in (None, columns.rows):
        warnings.warn(
            f"{name} makes {columns.rows} samples of the {reader.total} in its dataset: {AS_GIVEN}",
            UserWarning,
            stacklevel=2,
        )
    tree, padding = columns.tree()
    return Samples(tree, columns.rows, padding=padding, spool=columns.spool)


def _batches(reader: Reader, name: str) -> Generator[Any, None, None]:
    """The loader's batches; its workers end with it, however it ends."""
    iterator: Any = None
    number = 0
    try:
        with _errors_named(f"{name}: its reading could not start"), no_word_of_workers():
            iterator = iter(reader.loader)
        while True:
            with _errors_named(f"{name}: reading {reader.describe(number)} failed"):
                batch = next(iterator, _END)
            if batch is _END:
                return
            yield batch
            number += 1
    finally:
        if getattr(reader.loader, "_iterator", None) is not iterator:  # else its workers persist, and are the caller's
            getattr(iterator, "_shutdown_workers", _nothing)()


def _nothing() -> None:
    return


@contextmanager
def _errors_named(what: str) -> Iterator[None]:
    """Say where the caller's own code failed."""
    try:
        yield
    except Exception as error:
        kind = next((kind for kind in (TypeError, ValueError, MemoryError) if isinstance(error, kind)), RuntimeError)
        lines = str(error).strip().splitlines() or [""]
        found = lines[-1] if lines[0].startswith("Caught ") else f"{type(error).__name__}: {str(error).strip()}"
        raise kind(f"{what}: {found}") from error


@contextmanager
def _plain_modes(source: Any) -> Iterator[None]:
    """Gradients enabled, no inference mode, no autocast; tensors are made on the CPU, or where the generator is."""
    generator = getattr(source, "generator", None)
    device = generator.device if isinstance(generator, torch.Generator) else torch.device("cpu")
    with usual_modes(), nullcontext() if torch.get_default_device() == device else device:
        yield


def _check_finite(tensors: list[Tensor], name: str, first: int) -> None:
    for tensor in tensors:
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        for start in range(0, len(tensor), READ_BATCH):
            part = tensor[start : start + READ_BATCH]
            bad = (~torch.isfinite(part)).reshape(part.shape[0], -1).any(dim=1).nonzero()
            if bad.numel():
                raise ValueError(
                    f"{name} must hold finite numbers only; sample {first + start + int(bad[0])} has NaN or infinity"
                )
