"""The isotropic Gaussian probe against closed forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lossk
import oracles


def half_square(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return 0.5 * (model(batch[0]).squeeze(1) - batch[1]).square()


def problem() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(5)
    return nn.Linear(4, 1, bias=False), (torch.randn(9, 4), torch.randn(9))


def test_regression_has_its_closed_form() -> None:
    """T1 with S = sigma^2 I: K_ij = r_i r_j s_ij + s_ij^2 / 2. Error bars from 32 chains; |z| < 4.5.

    The 45 entries of a 4-dimensional problem are strongly dependent: over repeats with exact draws the root mean square
    z lies between 0.5 and 1.7. A sigma 10 % off is refused.
    """
    model, (x, y) = problem()
    sigma = 0.2
    traces = lossk.sample_losses(
        model, (x, y), loss=half_square, sampler=lossk.Gaussian(sigma=sigma), num_chains=32, num_draws=200,
        progress=False,
    )  # fmt: skip
    kernel = lossk.LossKernel.from_traces(traces)
    wide = x.double().numpy()
    residual = y.double().numpy() - wide @ model.weight.detach().double().numpy()[0]
    truth = oracles.regression_covariance(wide, residual, sigma**2 * np.eye(4))

    def upper_z(truth: np.ndarray) -> np.ndarray:
        z = (kernel.to_numpy() - truth) / kernel.standard_error(method="chains").numpy()
        return z[np.triu_indices(9)]

    assert np.abs(upper_z(truth)).max() < 4.5
    assert 0.5 < np.sqrt((upper_z(truth) ** 2).mean()) < 1.7
    assert np.abs(upper_z(1.21 * truth)).max() > 4.5
    assert abs(float(kernel.contents.moments.lag1.mean())) < 0.05, "draws must be independent"
    assert kernel.diagnostics.llc is None


def test_small_sigma_is_gradient_similarity() -> None:
    """K / sigma^2 -> g_i'g_j, with 4,000 draws: correlations within 5 / sqrt(4000) of the cosines of the gradients."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
    data = (torch.randn(15, 6), torch.randint(0, 3, (15,)))
    kernel = lossk.build_kernel(
        model, data, sampler=lossk.Gaussian(sigma=1e-4), num_chains=4, num_draws=1000, progress=False
    )
    gradients = []
    for i in range(15):
        loss = nn.functional.cross_entropy(model(data[0][i : i + 1]), data[1][i : i + 1])
        gradients.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))]))
    g = torch.stack(gradients).double()
    cosine = nn.functional.normalize(g, dim=1) @ nn.functional.normalize(g, dim=1).T
    assert (kernel.correlation().double() - cosine).abs().max() < 5 / 4000**0.5
    torch.testing.assert_close(kernel.variance / 1e-8, g.square().sum(dim=1), rtol=0.12, atol=0.0)


def test_model_restored_and_resumed_bitwise(tmp_path: Path) -> None:
    model, data = problem()
    before = model.weight.detach().clone()
    calls = 0

    def stopping(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == limit:
            raise RuntimeError("stopped by the test")
        return half_square(model, batch)

    common: dict[str, Any] = {
        "loss": stopping, "sampler": lossk.Gaussian(sigma=0.1), "num_chains": 2, "num_draws": 6, "panel": 2,
        "progress": False,
    }  # fmt: skip
    limit = 0
    whole = lossk.build_kernel(model, data, **common)
    limit, calls = calls - 3, 0
    with pytest.raises(RuntimeError, match="stopped"):
        lossk.build_kernel(model, data, out=tmp_path / "k.lossk", **common)
    limit = 0
    resumed = lossk.build_kernel(model, data, out=tmp_path / "k.lossk", resume=True, **common)
    assert np.array_equal(resumed.to_numpy(), whole.to_numpy())
    assert torch.equal(model.weight, before)
    changed = {**common, "sampler": lossk.SGLD(lr=1e-3)}
    with pytest.raises(lossk.StoreError, match="sampler"):
        lossk.build_kernel(model, data, out=tmp_path / "k.lossk", resume=True, **changed)


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan"), "wide", True])
def test_bad_sigma(sigma: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="sigma"):
        lossk.Gaussian(sigma=sigma)


def test_a_cloud_too_wide_is_named() -> None:
    model, data = problem()
    with pytest.raises(lossk.DivergedError, match=r"chain 0, draw 0: probe sample \d+ has loss inf; try sigma="):
        lossk.build_kernel(model, data, loss=half_square, sampler=lossk.Gaussian(sigma=1e25), progress=False)
