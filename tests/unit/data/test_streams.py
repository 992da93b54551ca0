"""`streams_kept`: the global random streams are where they were, whatever the block did."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from lossk.data.streams import streams_kept

DRAWS: dict[str, Callable[[], Any]] = {
    "torch": lambda: torch.rand(3, device="cpu", dtype=torch.float32).tolist(),
    "numpy": lambda: np.random.standard_normal(3).tolist(),  # noqa: NPY002
    "python": lambda: [random.gauss(0.0, 1.0) for _ in range(3)],
}


@contextmanager
def seeded() -> Iterator[None]:
    """Streams at a known place, and after the test where pytest had them."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    torch.manual_seed(5), np.random.seed(5), random.seed(5)  # noqa: NPY002
    try:
        yield
    finally:
        torch.set_rng_state(states[0]), np.random.set_state(states[1]), random.setstate(states[2])  # noqa: NPY002


@pytest.mark.parametrize("stream", DRAWS)
@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_the_next_numbers_are_as_without_the_block(stream: str, error: type[BaseException] | None) -> None:
    with seeded():
        DRAWS[stream]()  # a half-used pair of normals is state too
        expected = DRAWS[stream]()
    with seeded():
        DRAWS[stream]()
        with contextlib.suppress(KeyboardInterrupt, ValueError), streams_kept():
            torch.manual_seed(1), np.random.seed(1), random.seed(1)  # noqa: NPY002
            for draw in DRAWS.values():
                draw()
            if error is not None:
                raise error
        assert DRAWS[stream]() == expected


@pytest.mark.parametrize(
    "mode",
    [torch.inference_mode, torch.no_grad, lambda: torch.device("meta"), lambda: torch.autocast("cpu", torch.bfloat16)],
)
def test_in_the_modes_of_the_caller(mode: Callable[[], Any]) -> None:
    with seeded():
        expected = DRAWS["torch"]()
    with seeded(), mode():
        with streams_kept():
            torch.rand(2, device="cpu")
        assert DRAWS["torch"]() == expected


class _Generator:
    """What the module needs of a CUDA generator."""

    def __init__(self, seed: int) -> None:
        self.seed, self.offset = seed, 0

    def get_state(self) -> tuple[int, int]:
        return self.seed, self.offset

    def set_state(self, state: tuple[int, int]) -> None:
        self.seed, self.offset = state

    def initial_seed(self) -> int:
        return self.seed

    def manual_seed(self, seed: int) -> None:
        self.seed, self.offset = seed, 0


@pytest.mark.parametrize("initialized", [True, False])
def test_every_cuda_device(monkeypatch: pytest.MonkeyPatch, initialized: bool) -> None:
    """If the block initializes CUDA, its streams start over from their seeds."""
    devices = (_Generator(7), _Generator(8))
    if initialized:
        devices[1].offset = 12
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialized)
    monkeypatch.setattr(torch.cuda, "default_generators", devices)
    with streams_kept():
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        for device in devices:
            device.offset += 4
    assert [device.get_state() for device in devices] == [(7, 0), (8, 12 if initialized else 0)]
