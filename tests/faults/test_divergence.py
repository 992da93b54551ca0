"""A chain that leaves the neighborhood of the trained weights ends in words, with a smaller step to try."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lossk

Build = Callable[..., lossk.LossKernel]


@pytest.mark.parametrize("lr", [1e4, 1e30])
def test_divergence(build: Build, problem: Any, sgld: Any, lr: float) -> None:
    """The message names chain, step, loss and a smaller lr, and that lr is smaller."""
    with pytest.raises(lossk.DivergedError) as caught:
        build(problem.model(), problem.data, sampler=sgld(lr=lr, num_burnin_steps=500))
    message = str(caught.value)
    assert re.search(r"chain\W+\d", message), message
    assert re.search(r"step\W+\d", message), message
    assert "loss" in message
    suggestions = [float(v) for v in re.findall(r"lr\D{0,12}?(\d[\d.]*(?:e[+-]?\d+)?)", message)]
    assert any(0 < v < lr for v in suggestions), message


@pytest.mark.parametrize("training", [True, False], ids=["training", "probe"])
def test_a_loss_that_stops_being_finite(build: Build, problem: Any, training: bool) -> None:
    """In the middle of a chain, in a minibatch or in one probe sample: no NaN ever reaches a kernel."""
    calls = 0

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        nonlocal calls
        losses = nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
        if torch.is_grad_enabled() == training:
            calls += 1
        if calls > 200:  # past the checks and the pilot
            losses = losses * torch.where(torch.arange(len(losses)) == 0, float("nan"), 1.0)
        return losses

    with pytest.raises(lossk.DivergedError, match=r"chain\W+\d.*step\W+\d"):
        build(problem.model(), problem.data, loss=loss, num_draws=200)


def test_divergence_leaves_no_finished_store(build: Build, problem: Any, sgld: Any, tmp_path: Path) -> None:
    store = tmp_path / "k.lossk"
    with pytest.raises(lossk.DivergedError):
        build(problem.model(), problem.data, sampler=sgld(lr=1e30, num_burnin_steps=500), out=store)
    with pytest.raises((lossk.errors.StoreError, FileNotFoundError)):
        lossk.open(store)
