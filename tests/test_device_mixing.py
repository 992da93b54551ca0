"""Host and device tensors are not mixed up: CUDA without a GPU, by torch's fake tensors, which know devices and shapes.

They compute nothing, so this says where tensors lie and no more.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lossk import device, host_tiles, tiles
from lossk.head import FusedHead, Head
from lossk.host_tiles import HostTiles
from lossk.tiles import TileAccumulator

CUDA = torch.device("cuda")


class NoStream(device.SideStream):
    """Work runs at once: a stream needs a driver."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(torch.device("cpu"))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tiles, "SideStream", NoStream)
    monkeypatch.setattr(host_tiles, "pinned", lambda tensor: tensor.cpu())
    monkeypatch.setattr(torch.Tensor, "any", lambda self: True)  # no value is known: the longer way is gone
    with FakeTensorMode():
        yield


@pytest.mark.parametrize("centering", ["chain", "pooled"])
@pytest.mark.parametrize("kind", [TileAccumulator, HostTiles])
def test_updates_and_the_finished_kernel(fake: None, kind: Any, centering: str) -> None:
    options: dict[str, Any] = {"num_chains": 2, "num_draws": 3, "centering": centering, "device": CUDA}
    waiting = {"waiting": 4} if kind is HostTiles else {}
    accumulator = kind(37, 16, **options, **waiting)
    for chain in range(2):
        for count in (2, 1):
            accumulator.update(chain, torch.zeros(count, 37, device=CUDA if chain else "cpu"))
    blocks, moments = accumulator.finalize()
    home = "cpu" if kind is HostTiles else "cuda"
    assert {tile.device.type for tile in blocks.tiles.values()} == {home}
    assert {getattr(moments, name).device.type for name in ("mean", "variance", "scale", "chain_mean", "lag1")} == {
        "cpu"
    }
    assert accumulator.totals.variance.device.type == "cpu"
    assert blocks.read_tile(0, 1).device.type == "cpu"
    assert blocks.tile_on(0, 1, CUDA).device.type == "cuda"


@pytest.mark.parametrize("precision", [None, "bf16"])
@pytest.mark.parametrize("draws", [None, 3])
def test_losses_of_a_head(fake: None, precision: str | None, draws: int | None) -> None:
    linear = torch.nn.Linear(8, 5, device=CUDA)
    head = FusedHead(Head(linear, lambda inputs: inputs, None, True), True, "torch", precision)
    stack = None if draws is None else torch.zeros(draws, 45, device=CUDA)
    heads = None if stack is None else head.heads_of(stack, list(linear.parameters()))
    batch = torch.zeros(2, 4, 8, device=CUDA), torch.zeros(2, 4, dtype=torch.int64, device=CUDA)
    losses, mask = head.evaluator(heads)(batch)
    assert list(losses.shape) == [2, 4] if draws is None else [draws, 2, 4]
    assert mask is not None
    assert losses.device.type == mask.device.type == "cuda"
