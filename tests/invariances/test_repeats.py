"""What a run repeats to, as its record and its printed plan say."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tests.conftest import Classification, sgld
from tests.cuda_standin import StandIn
from torch import Tensor, nn

import lossk
from lossk.device import repeats

SETTINGS = {"sampler": sgld(), "num_chains": 1, "num_draws": 3, "backend": "torch", "progress": False}


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_by_the_device() -> None:
    assert repeats(torch.device("cpu")) == "bitwise"
    assert repeats(torch.device("cuda")) == "within rounding"


def test_with_torchs_own_flag(deterministic: None) -> None:
    assert repeats(torch.device("cuda")) == "bitwise"
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert repeats(torch.device("cuda")) == "within rounding"


def built(problem: Classification) -> lossk.LossKernel:
    model = problem.model()
    with StandIn():
        return lossk.build_kernel(model, problem.data, device="cuda", **SETTINGS)


def test_the_record_says_so(problem: Classification) -> None:
    kernel = built(problem)
    assert kernel.meta["repeats"] == "within rounding"
    assert "repeats = within rounding: gradients add up in any order here" in kernel.meta["passes_reasons"]
    assert lossk.build_kernel(problem.model(), problem.data, **SETTINGS).meta["repeats"] == "bitwise"


def test_the_record_says_that_torchs_flag_was_on(problem: Classification, deterministic: None) -> None:
    assert built(problem).meta["repeats"] == "bitwise"
    assert torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("asked", [True, False])
def test_cudnn_does_not_choose_by_the_clock(problem: Classification, asked: bool) -> None:
    seen: list[bool] = []

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        seen.append(torch.backends.cudnn.benchmark)
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    torch.backends.cudnn.benchmark = True
    torch.use_deterministic_algorithms(asked)
    try:
        lossk.build_kernel(problem.model(), problem.data, loss=loss, **SETTINGS)
        assert seen[-1] is not asked
        assert torch.backends.cudnn.benchmark
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = False
