"""A run is resumed by the loss and the model it began with; others of the same name and weights are refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lossk

Build = Callable[..., lossk.LossKernel]


def weighted(model: nn.Module, batch: Any, weights: list[float], smoothing: float = 0.0) -> Tensor:
    return F.cross_entropy(
        model(batch[0]), batch[1], torch.tensor(weights), reduction="none", label_smoothing=smoothing
    )


def smoothed(amount: float) -> Any:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none", label_smoothing=amount)

    return loss


class Stopping:
    """A loss of the same name as another's, stopped after so many calls."""

    def __init__(self, loss: Any, calls: int) -> None:
        self.loss, self.left = loss, calls
        self.__qualname__ = self.__name__ = "loss"

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return self.loss(model, batch)


CHANGES: dict[str, tuple[Any, Any]] = {
    "a partial's class weights": (
        functools.partial(weighted, weights=[1.0, 1.0, 1.0]),
        functools.partial(weighted, weights=[1.0, 1.0, 1.01]),
    ),
    "a closure's smoothing": (smoothed(0.1), smoothed(0.101)),
    "a lambda's body": (
        lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none"),
        lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none") + 0.01,
    ),
}


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_another_loss_of_the_same_name_does_not_resume(
    build: Build, problem: Any, tmp_path: Any, change: str, finished: bool
) -> None:
    first, second = CHANGES[change]
    settings: dict[str, Any] = {"out": tmp_path / "k.lossk", "panel": 1, "num_draws": 40}
    first_loss = Stopping(first, 10**9 if finished else 150)
    if finished:
        build(problem.model(), problem.data, loss=first_loss, **settings)
    else:
        with pytest.raises(KeyboardInterrupt):
            build(problem.model(), problem.data, loss=first_loss, **settings)
    with pytest.raises(lossk.StoreError, match=r"losses of loader at the trained weights: \d+ of 21 differ"):
        build(problem.model(), problem.data, loss=Stopping(second, 10**9), resume=True, **settings)
    again = build(problem.model(), problem.data, loss=Stopping(first, 10**9), resume=True, **settings)
    whole = build(problem.model(), problem.data, loss=Stopping(first, 10**9), panel=1, num_draws=40)
    np.testing.assert_array_equal(again.to_numpy(), whole.to_numpy())


def test_another_network_with_the_same_weights_does_not_resume(build: Build, problem: Any, tmp_path: Any) -> None:
    model = problem.model()
    build(model, problem.data, out=tmp_path / "k.lossk")
    model[1] = nn.ReLU()
    with pytest.raises(lossk.StoreError, match="the loss or the model is another one"):
        build(model, problem.data, out=tmp_path / "k.lossk", resume=True)
