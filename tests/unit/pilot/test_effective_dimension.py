"""The effective dimension against eigenvalues in closed form, made whole and estimated."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import lossk
from lossk.data.reading import read_samples
from lossk.pilot import effective_dimension as module
from lossk.pilot.effective_dimension import effective_dimension, ritz
from lossk.task.losses import resolve_loss
from lossk.task.task import Task


def regression(inputs: int) -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor], np.ndarray]:
    """A linear model, its data, and the eigenvalues of the Hessian of its mean squared error."""
    generator = torch.Generator().manual_seed(inputs)
    x = torch.randn(200, inputs, generator=generator) * torch.logspace(0, -2, inputs)
    torch.manual_seed(0)
    model, wide = nn.Linear(inputs, 1, bias=False), x.double().numpy()
    return model, (x, x.sum(dim=1, keepdim=True)), np.linalg.eigvalsh(2 * wide.T @ wide / len(wide))


@pytest.mark.parametrize(("inputs", "rel"), [(5, 1e-3), (60, 5e-3), (150, 0.1)])
@pytest.mark.parametrize("localization", [0.3, 30.0])
def test_linear_regression(inputs: int, rel: float, localization: float) -> None:
    """Whole up to 96 weights, estimated beyond."""
    model, data, h = regression(inputs)
    expected = float((50 * h / (50 * h + localization)).sum())
    with Task(model, resolve_loss("mse")) as task:
        found = effective_dimension(task, read_samples(data), n_beta=50.0, localization=localization)
    assert found == pytest.approx(expected, rel=rel)


def test_in_a_metric_the_coordinates_are_its_own() -> None:
    """Scaled by D, eigenvalues are those of D H D; of one tensor, D^2 times as large."""
    model, data, h = regression(5)
    expected = float((50 * 9 * h / (50 * 9 * h + 4)).sum())
    with Task(model, resolve_loss("mse")) as task:
        task.rescale([3.0])
        found = effective_dimension(task, read_samples(data), n_beta=50.0, localization=4.0)
    assert found == pytest.approx(expected, rel=1e-3)


def test_negative_curvature_counts_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """-|w|^2 has no direction that the data determine; whole and estimated."""
    model, data, _ = regression(5)

    def hill(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return 0.0 * model(batch[0]).squeeze(1) - sum(p.square().sum() for p in model.parameters())

    for exact in (96, 0):
        monkeypatch.setattr(module, "EXACT", exact)
        with Task(model, resolve_loss(hill)) as task:
            found = effective_dimension(task, read_samples(data), n_beta=50.0, localization=1.0)
        assert found == pytest.approx(0.0, abs=1e-3)


def test_ritz_values_carry_the_start() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.linspace(1.0, 6.0, 6)
    start = torch.randn(6, generator=generator)
    found, weights = ritz(lambda v: values * v, start, 6)
    np.testing.assert_allclose(found, values.numpy(), rtol=1e-4)
    np.testing.assert_allclose(weights, (start.square() / start.square().sum()).numpy(), rtol=1e-2)


def test_an_automatic_run_says_it() -> None:
    model, data, h = regression(5)
    with torch.no_grad():
        model.weight.fill_(1.0)
    kernel = lossk.build_kernel(model, data, loss="mse", num_chains=2, num_draws=20, progress=False)
    law = kernel.meta["sampler"]
    expected = float((law["n_beta"] * h / (law["n_beta"] * h + law["localization"])).sum())
    assert kernel.diagnostics is not None
    assert kernel.diagnostics.effective_dimension == pytest.approx(expected, rel=1e-2)
    assert "directions in which the data beat the pull" in str(kernel.diagnostics)
