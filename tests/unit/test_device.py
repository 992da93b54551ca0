"""Which CUDA device is current in a rank of a run, and that the caller's comes back."""

from __future__ import annotations

import pytest
import torch

from lossk.device import make_current
from lossk.ranks.distributed import Ranks


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The devices that were made current, the caller's first; CUDA is in use."""
    seen = [3]
    monkeypatch.setattr(
        torch.cuda,
        "set_device",
        lambda device: seen.append(torch.device("cuda", device).index if isinstance(device, int) else device.index),
    )
    monkeypatch.setattr(torch.cuda, "current_device", lambda: seen[-1])
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    return seen


def rank(number: int) -> Ranks:
    ranks = Ranks.__new__(Ranks)
    ranks.local_rank, ranks._current = number, None
    return ranks


def test_a_rank_uses_its_own_device_and_gives_the_callers_back(current: list[int]) -> None:
    ranks = rank(1)
    assert ranks.own_device("cuda") == torch.device("cuda", 1)
    assert current == [3, 1]
    assert ranks.own_device("cuda:2") == "cuda:2"
    ranks.leave_device()
    assert current == [3, 1, 2, 3]


@pytest.mark.parametrize("device", ["cpu", None])
def test_other_devices_leave_it_alone(current: list[int], device: str | None) -> None:
    ranks = rank(1)
    assert ranks.own_device(device) == device
    ranks.leave_device()
    assert current == [3]


def test_where_cuda_was_not_in_use_nothing_is_given_back(current: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert make_current(torch.device("cuda", 1)) is None
    assert current == [3, 1]
