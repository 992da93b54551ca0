"""The global random streams, put back where they were after code of the user's that may draw from them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


@contextmanager
def streams_kept() -> Iterator[None]:
    """Put the global streams of torch (CPU, every CUDA device), NumPy and Python's `random` back, whatever happens.

    It costs some tens of microseconds. It never initializes CUDA: if the block does, CUDA's streams then start over
    from their seeds, which is where they would have begun.
    """
    python, legacy = random.getstate(), np.random.get_state(legacy=False)  # noqa: NPY002
    cpu, cuda = torch.default_generator.get_state(), _cuda_states()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002
        torch.default_generator.set_state(cpu)
        _put_back_cuda(cuda)


def _cuda_states() -> list[Tensor] | None:
    """The state of each CUDA device's stream; None before CUDA is initialized."""
    if not torch.cuda.is_initialized():
        return None
    return [generator.get_state() for generator in torch.cuda.default_generators]


def _put_back_cuda(states: list[Tensor] | None) -> None:
    if not torch.cuda.is_initialized():
        return
    for index, generator in enumerate(torch.cuda.default_generators):
        if states is None:
            generator.manual_seed(generator.initial_seed())
        else:
            generator.set_state(states[index])
