"""State that a forward pass or a change of mode leaves in a model beside its parameters and buffers: it is put back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from test_kinds_modules import vectors
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune, spectral_norm, weight_norm

import lossk
from kind_world import World
from kinds import NUM_STEPS, Kind, check, cross_entropy, descent, losses_of_descent

CLASSES = 3


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def network_with_norm() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, CLASSES))


class Positions(nn.Module):
    """A table and settings as plain attributes, made once: tracing a model may leave others beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.cached = torch.linspace(-1.0, 1.0, 6)
        self.settings = {"scale": 2.0, "sizes": [6, 3]}
        self.net = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + self.settings["scale"] * self.cached)


def hook_style(function: Any) -> nn.Module:
    """The reparametrization that keeps the weight as a plain attribute, made anew before each forward pass."""
    return nn.Sequential(function(nn.Linear(6, 8)), nn.Tanh(), function(nn.Linear(8, CLASSES)))


def pruned() -> nn.Module:
    model = network()
    prune.l1_unstructured(model[0], "weight", amount=0.3)
    return model


class Rotary(nn.Module):
    """Builds its table at its first forward pass, and whenever a longer one is needed."""

    def __init__(self) -> None:
        super().__init__()
        self.table: Tensor | None = None
        self.net = network()

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None or self.table.dtype != x.dtype:
            self.table = torch.cos(torch.arange(6.0, dtype=x.dtype))
        return self.net(x * self.table)


class Counter(nn.Module):
    """Counts its passes and keeps its last output."""

    def __init__(self) -> None:
        super().__init__()
        self.passes, self.last = 0, torch.zeros(0)
        self.net = network()

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        self.last = self.net(x).detach()
        return self.net(x)


STATEFUL = {
    "weight-norm-by-hooks": Kind(lambda: hook_style(weight_norm), vectors),
    "spectral-norm-by-hooks": Kind(lambda: hook_style(spectral_norm), vectors),
    "pruned": Kind(pruned, vectors),
    "table-made-in-forward": Kind(Rotary, vectors),
    "table-first-made-by-lossk": Kind(Rotary, vectors, used=False),
    "counts-its-passes": Kind(Counter, vectors),
    "table-as-a-plain-attribute": Kind(Positions, vectors),
}


@pytest.mark.parametrize("kind", STATEFUL)
@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning")
def test_state_made_in_forward(kind: str) -> None:
    check(STATEFUL[kind])


class Merging(nn.Linear):
    """A low-rank layer in the older manner: it merges itself into its weight in eval mode, out of it in training."""

    def __init__(self) -> None:
        super().__init__(6, 8)
        self.weight.requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(8, 2))
        self.merged = False

    def train(self, mode: bool = True) -> Merging:
        super().train(mode)
        if mode == self.merged:
            with torch.no_grad():
                self.weight += (-1 if mode else 1) * self.up @ self.down
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        found = super().forward(x)
        return found if self.merged else found + x @ self.down.t() @ self.up.t()


def test_an_adapter_that_merges_by_itself() -> None:
    """It is sampled as a function of its own weights, which merged ones would hide, and comes back as it was."""

    def unmerged(model: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(model.train(), batch)

    def make() -> nn.Module:
        return nn.Sequential(Merging(), nn.Tanh(), nn.Linear(8, CLASSES).requires_grad_(False))

    kind = Kind(make, vectors, hand=unmerged)
    model, untouched, batch = kind.model(), kind.model(), kind.batch()
    world = World(model, data=batch)
    traces = lossk.sample_losses(model, batch, sampler=descent(), num_chains=1, num_draws=NUM_STEPS, progress=False)
    assert np.abs(traces.losses[0].double().numpy() - losses_of_descent(kind)).max() <= 3 * kind.bound
    world.assert_same()
    for each in (model, untouched):
        kind.train_step(each)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), untouched.parameters(), strict=True))


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


DISTRIBUTED = {
    "distributed-data-parallel": Kind(lambda: DistributedDataParallel(network()), vectors),
    "distributed-data-parallel-batch-norm": Kind(lambda: DistributedDataParallel(network_with_norm()), vectors),
    "distributed-data-parallel-unused-parameters": Kind(
        lambda: DistributedDataParallel(network(), find_unused_parameters=True), vectors
    ),
}


@pytest.mark.parametrize("kind", DISTRIBUTED)
def test_distributed_data_parallel(kind: str, process_group: None) -> None:
    check(DISTRIBUTED[kind])
