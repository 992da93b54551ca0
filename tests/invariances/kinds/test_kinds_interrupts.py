"""Ctrl-C at four moments, while reading, checking, in the pilot and while sampling: the user's world is as it was."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

import lossk
from kind_world import World, bits
from kinds import Kind, short, weights_near
from lossk.interop.weights import kernel_from_weights

N, CLASSES = 12, 3


class Cached(nn.Module):
    """Norms, dropout, a frozen and a tied part: what a run has to put back."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2))
        self.tied, self.head = nn.Linear(6, 6), nn.Linear(6, CLASSES)
        self.tied.weight = self.body[0].weight
        self.head.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tied(self.body(x)))


KIND = Kind(Cached, lambda: (torch.randn(N, 6), torch.arange(N) % CLASSES))


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, also in a job of a shell's background, where it would be ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def never(call: int) -> bool:
    return False


class Interrupting:
    """Cross entropy during which the user presses Ctrl-C at one of its calls."""

    def __init__(self, when: Callable[[int], bool] = never) -> None:
        self.when, self.calls = when, 0
        self.__name__ = self.__qualname__ = "Interrupting"

    def __call__(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.calls += 1
        if self.when(self.calls):
            signal.raise_signal(signal.SIGINT)
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


class Interrupted(Dataset[tuple[Tensor, Tensor]]):
    """Data while whose reading the user presses Ctrl-C."""

    def __init__(self) -> None:
        self.x, self.y = KIND.batch()

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index == 7:
            signal.raise_signal(signal.SIGINT)
        return self.x[index], self.y[index]


def automatic(model: nn.Module, data: Any, loss: Any, **settings: Any) -> None:
    """A run that has a pilot."""
    sampler = lossk.SGLD(num_burnin_steps=2, num_steps_bw_draws=1, batch_size=4)
    lossk.build_kernel(model, data, loss=loss, sampler=sampler, num_chains=1, num_draws=8, tile=16, **settings)


def interrupted(when: Callable[[int], bool], **settings: Any) -> None:
    """A run is stopped by Ctrl-C, and then the user trains on."""
    model, untouched, batch = KIND.model(), KIND.model(), KIND.batch()
    world, loss = World(model, data=batch), Interrupting(when)
    with pytest.raises(KeyboardInterrupt):
        automatic(model, batch, loss, **settings)
    world.assert_same()
    for each in (model, untouched):
        KIND.train_step(each)
    assert [bits(p) for p in model.parameters()] == [bits(p) for p in untouched.parameters()]


@pytest.fixture(scope="module")
def calls() -> int:
    """How often a whole run calls its loss."""
    loss = Interrupting()
    automatic(KIND.model(), KIND.batch(), loss, progress=False)
    return loss.calls


def test_while_reading() -> None:
    model, data = KIND.model(), Interrupted()
    world = World(model, data=[data.x, data.y])
    with pytest.raises(KeyboardInterrupt):
        automatic(model, data, "cross_entropy", progress=False)
    world.assert_same()


@pytest.mark.parametrize("call", [1, 2, 5])
def test_while_checking(call: int, capsys: pytest.CaptureFixture[str]) -> None:
    interrupted(lambda number: number == call)
    assert "pilot:" not in capsys.readouterr().err


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_in_the_pilot(share: float, calls: int, capsys: pytest.CaptureFixture[str]) -> None:
    interrupted(lambda number: number == int(share * calls))
    assert "cost:" not in capsys.readouterr().err


@pytest.mark.parametrize("before_the_end", [0, 3, 6])
def test_while_sampling(before_the_end: int, calls: int, capsys: pytest.CaptureFixture[str]) -> None:
    interrupted(lambda number: number == calls - before_the_end)
    assert "cost:" in capsys.readouterr().err


def test_a_store_that_was_interrupted_goes_on(calls: int, tmp_path: Path, assert_same_kernel: Any) -> None:
    whole = {"sampler": short(), "num_chains": 2, "num_draws": 4, "tile": 16, "panel": 2, "progress": False}
    loss = Interrupting()
    expected = lossk.build_kernel(KIND.model(), KIND.batch(), loss=loss, **whole)
    loss.when, last, model = (lambda number: number == last - 4), 2 * loss.calls, KIND.model()
    world = World(model)
    with pytest.raises(KeyboardInterrupt):
        lossk.build_kernel(model, KIND.batch(), loss=loss, out=tmp_path / "k.lossk", **whole)
    world.assert_same()
    loss.when = never
    resumed = lossk.build_kernel(model, KIND.batch(), loss=loss, out=tmp_path / "k.lossk", resume=True, **whole)
    assert_same_kernel(resumed, expected)
    world.assert_same()


@pytest.mark.parametrize("draw", [0, 3])
def test_among_given_weights(draw: int) -> None:
    """In the user's own generator, between two states."""
    model, batch = KIND.model(), KIND.batch()
    states = weights_near(model)
    world = World(model, data=batch)

    def stopping() -> Any:
        yield from itertools.islice(states, draw)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        kernel_from_weights(stopping(), model, batch, progress=False)
    world.assert_same()
