"""What data draw from and lie in: random streams, a loader's generator, memory that nobody may write to."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_kinds_loaders import Items, show, tensors
from torch.utils.data import DataLoader

from kind_world import bits


def test_an_array_on_disk(tmp_path: Path) -> None:
    """A file mapped into memory, which nobody may write to."""
    x, y = tensors()
    np.save(tmp_path / "x.npy", x.numpy())
    show(lambda: (np.load(tmp_path / "x.npy", mmap_mode="r"), y))


class Augmented(Items):
    """Draws from every stream that augmentation uses, and gives the sample as it is."""

    def __getitem__(self, index: int) -> Any:
        torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 1])
def test_random_streams_stay(workers: int) -> None:
    show(lambda: DataLoader(Augmented(), batch_size=4, num_workers=workers))


def test_a_loaders_generator_stays() -> None:
    generator = torch.Generator().manual_seed(7)
    before = generator.get_state()
    loader = DataLoader(Items(), batch_size=4, shuffle=True, generator=generator)
    with pytest.warns(UserWarning, match="shuffles"):
        show(lambda: loader)
    assert bits(generator.get_state()) == bits(before)
