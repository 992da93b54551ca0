"""The global random streams, put back where they were after code of the user's that may draw from them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


class Streams:
    """The global streams as they are: torch's (CPU and every CUDA device), NumPy's and Python's `random`."""

    def __init__(self) -> None:
        self.python, self.legacy = random.getstate(), np.random.get_state(legacy=False)  # noqa: NPY002
        self.cpu, self.cuda = torch.default_generator.get_state(), _cuda_states()
        self.seed = torch.initial_seed()

    def reseeded(self) -> bool:
        """Whether torch's stream has begun anew since, or NumPy's or Python's has moved."""
        now = Streams()
        numpy = str(now.legacy) != str(self.legacy)
        return now.seed != self.seed or now.python != self.python or numpy

    def put_back(self) -> None:
        """Put all of them back. CUDA, if initialized since, then starts over from its seeds, as it would have."""
        random.setstate(self.python)
        np.random.set_state(self.legacy)  # noqa: NPY002
        torch.default_generator.set_state(self.cpu)
        _put_back_cuda(self.cuda)


@contextmanager
def streams_kept() -> Iterator[None]:
    """Put the global streams back, whatever happens. It costs some tens of microseconds, and never initializes CUDA."""
    streams = Streams()
    try:
        yield
    finally:
        streams.put_back()


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
