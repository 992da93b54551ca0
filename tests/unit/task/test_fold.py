"""Batch norms folded into convolutions: the same losses, gradients and kernel, and only where it is right."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lossk
from conftest import sgld
from lossk.data.data import Samples
from lossk.pilot import passes_pilot
from lossk.task.fold import FoldedConvolution, fold_norms
from lossk.task.losses import resolve_loss
from lossk.task.task import Task

Build = Callable[..., lossk.LossKernel]


def network(affine: bool = True, bias: bool = True) -> nn.Module:
    """Two folded pairs, one grouped; statistics as after training."""
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, bias=bias), nn.BatchNorm2d(6, affine=affine), nn.ReLU(),
        nn.Conv2d(6, 6, 3, stride=2, groups=3, bias=bias, padding_mode="circular", padding=1), nn.BatchNorm2d(6),
        nn.Flatten(), nn.Linear(54, 3),
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = torch.randn(6)
            module.running_var = torch.rand(6) * 3 + 0.01
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.eval()


def images(num_samples: int = 11) -> tuple[Tensor, Tensor]:
    return torch.randn(num_samples, 2, 6, 6), torch.arange(num_samples) % 3


def folded_count(model: nn.Module | None) -> int:
    return 0 if model is None else sum(isinstance(module, FoldedConvolution) for module in model.modules())


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_same_function(affine: bool, bias: bool) -> None:
    """Outputs of order one: two float32 evaluations of sums of 54 products differ by some 1e-6."""
    model, (x, _) = network(affine, bias), images()
    folded = fold_norms(model)
    assert folded_count(folded) == 2
    assert folded is not None
    with torch.no_grad():
        wide = deepcopy(model).double()(x.double())
        error, plain = (float((net(x).double() - wide).abs().max()) for net in (folded, model))
    assert error <= 4 * plain + 1e-6


def test_it_follows_the_weights_and_has_their_gradients() -> None:
    model, (x, y) = network(), images()
    folded = fold_norms(model)
    assert folded is not None
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    parameters = list(model.parameters())
    slopes = [torch.autograd.grad(nn.functional.cross_entropy(net(x), y), parameters) for net in (folded, model)]
    for found, expected in zip(*slopes, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_the_same_kernel(build: Build) -> None:
    model, data = network(), images()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = build(model, data).to_numpy()
    found = build(model, data, passes=lossk.Passes(fold_norms=True)).to_numpy()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4 * np.abs(expected).max())
    assert not np.array_equal(found, expected)  # it did something


def test_with_a_frozen_prefix_and_laplace(build: Build) -> None:
    model, data = network(), images()
    for sampler in (sgld(params=["3.*", "4.*"]), lossk.Laplace(n_beta=30.0, localization=5.0)):
        expected = build(model, data, sampler=sampler).to_numpy()
        found = build(model, data, sampler=sampler, passes=lossk.Passes(fold_norms=True)).to_numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4 * np.abs(expected).max())


class Shared(nn.Module):
    """The convolution's output is also read without the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm, self.head = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.convolution(x)
        return self.head((x + self.norm(x)).mean((2, 3)))


class Untraceable(Shared):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(-x if float(x.abs().sum()) < 0 else x)


@pytest.mark.parametrize("make", [Shared, Untraceable, lambda: nn.Linear(3, 2), lambda: network().train()])
def test_nothing_to_fold(make: Callable[[], nn.Module]) -> None:
    assert fold_norms(make()) is None


def test_a_model_that_cannot_be_folded_runs_as_it_is(build: Build) -> None:
    model, data = Untraceable(), images()
    expected = build(model, data).to_numpy()
    np.testing.assert_array_equal(build(model, data, passes=lossk.Passes(fold_norms=True)).to_numpy(), expected)


def test_the_pilot_tries_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(bench: Any, passes: lossk.Passes, part: int | None = None, *_: Any, once: bool = False) -> Any:
        seconds = 5e-4 if passes.fold_norms else 1e-3
        return (0.0 if part == 1 else seconds), (0.0 if part == 0 else seconds)

    monkeypatch.setattr(passes_pilot._Bench, "measure", measure)
    task, samples = Task(network(), resolve_loss("cross_entropy")), Samples(images(), 11)
    found, _ = passes_pilot.choose_passes(task, samples, samples, passes_pilot.Load(10**5, 10**5, 4))
    assert found.fold_norms
