"""Small data sets and loaders for the tests of reading."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

N = 10


def numbers() -> Tensor:
    """[N, 3] float32."""
    return torch.arange(3.0 * N, dtype=torch.float32, device="cpu").reshape(N, 3) / 7


def labels() -> Tensor:
    """[N] int64."""
    return torch.arange(N, dtype=torch.int64, device="cpu") % 3


class Items(Dataset[Any]):
    """A dataset of what a function makes of a sample's number."""

    def __init__(self, item: Callable[[int], Any], length: int = N) -> None:
        self.item, self.length = item, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> Any:
        return self.item(i)


def batches_of(*batches: Any) -> DataLoader[Any]:
    """A loader of ready batches."""
    return DataLoader(Items(lambda i: batches[i], len(batches)), batch_size=None, collate_fn=same)


def same(batch: Any) -> Any:
    return batch


def quiet(make: Callable[[], Any]) -> Any:
    """Made without torch's word that this kind is young."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


class Flow(IterableDataset[Any]):
    """Whole batches of N samples, 120 bytes each; without end if `length` is None."""

    def __init__(self, length: int | None = None, *, started: Callable[[], None] = lambda: None) -> None:
        self.length, self.started = length, started

    def __iter__(self) -> Iterator[Any]:
        self.started()
        count = 0
        while self.length is None or count < self.length:
            yield torch.ones(N, 28), torch.arange(N)
            count += 1
