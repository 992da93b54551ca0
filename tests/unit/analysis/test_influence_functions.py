"""Influence functions against their formulas in float64, with dense curvatures by automatic differentiation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lossk
from frozen_network import Data, entropy, images, network, wide_gradients
from lossk.analysis import influence_functions


@pytest.fixture
def data() -> Data:
    return images()


def softmax_regression(n: int = 40) -> tuple[nn.Linear, Data]:
    generator = torch.Generator().manual_seed(2)
    y = torch.arange(n) % 3
    x = torch.randn(n, 2, generator=generator) + torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])[y]
    model = nn.Linear(2, 3)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.8, -0.1], [0.0, 0.9], [-0.7, -0.9]]))
        model.bias.zero_()
    return model, (x, y)


def exact_influence(model: nn.Linear, data: Data, damping: float) -> tuple[Tensor, Tensor]:
    """(g (H + damping)^-1 g', H) in float64, H by automatic differentiation of the mean loss in (weight, bias)."""
    x, y = data[0].double(), data[1]
    flat = torch.cat([model.weight.detach().double().flatten(), model.bias.detach().double()])

    def mean(w: Tensor) -> Tensor:
        return F.cross_entropy(x @ w[:6].view(3, 2).T + w[6:], y)

    h = torch.func.jacrev(torch.func.jacrev(mean))(flat)
    g = wide_gradients(softmax_regression()[0], data, entropy)
    return g @ torch.linalg.solve(h + damping * torch.eye(9, dtype=torch.float64), g.T), h


@pytest.mark.parametrize("curvature", ["gauss-newton", "hessian"])
@pytest.mark.parametrize("solver", ["dense", "cg"])
def test_damped_influence_is_the_formula(curvature: str, solver: str) -> None:
    """Softmax regression is linear in its weights: Gauss-Newton and Hessian are one."""
    model, data = softmax_regression()
    expected, _ = exact_influence(model, data, 0.05)
    found = influence_functions.damped_influence(
        model, data, train=data, damping=0.05, curvature=curvature, solver=solver, tolerance=1e-6
    )
    np.testing.assert_allclose(found[:], expected, atol=2e-5 * float(expected.abs().max()))
    assert (found.duals is None) == (solver == "dense")
    assert found.sets == {}
    part = influence_functions.damped_influence(
        model, lossk.ProbeSets(a=data, b=(data[0][:4], data[1][:4])), train=data, damping=0.05
    )
    np.testing.assert_allclose(
        part[part.sets["b"], part.sets["a"]], expected[:4], atol=2e-5 * float(expected.abs().max())
    )


def test_curvatures_of_a_nonlinear_network(data: Data) -> None:
    """Products of both curvatures against dense float64 ones of a network with batch norm, by influence at a damping
    above every negative eigenvalue."""
    model = network()
    wide = network().double().eval()
    names = [name for name, _ in wide.named_parameters()]
    x, y, weights = data[0].double(), data[1], [p.detach() for p in wide.parameters()]

    def outputs(flat: Tensor) -> Tensor:
        parts = [part.view_as(w) for part, w in zip(flat.split([w.numel() for w in weights]), weights, strict=True)]
        return torch.func.functional_call(wide, dict(zip(names, parts, strict=True)), (x,))

    flat = torch.cat([w.flatten() for w in weights])
    hessian = torch.func.jacrev(torch.func.jacrev(lambda w: F.cross_entropy(outputs(w), y)))(flat)
    jacobian, p = torch.func.jacrev(outputs)(flat), outputs(flat).softmax(dim=1)
    s = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    gauss = torch.einsum("bcp,bcd,bdq->pq", jacobian, s, jacobian) / len(y)
    some = ["0.*", "1.*", "7.*"]  # weights enough; the others only cost time
    keep = torch.cat([torch.full((w.numel(),), name[0] in "017") for name, w in zip(names, weights, strict=True)])
    hessian, gauss = hessian[keep][:, keep], gauss[keep][:, keep]
    g = wide_gradients(network(), data, entropy)[:, keep]
    for curvature, h in (("hessian", hessian), ("gauss-newton", gauss)):
        damping = 0.5
        assert float(torch.linalg.eigvalsh(h)[0]) > -damping
        expected = g @ torch.linalg.solve(h + damping * torch.eye(len(h), dtype=torch.float64), g.T)
        found = influence_functions.damped_influence(
            model, data, train=data, damping=damping, curvature=curvature, params=some
        )
        np.testing.assert_allclose(found[:], expected, atol=1e-4 * float(expected.abs().max()))
    smallest = float(torch.linalg.eigvalsh(hessian)[0])
    assert smallest < -1e-3
    for solver, message in (("dense", "damping must be greater than"), ("cg", "positive definite")):
        with pytest.raises(ValueError, match=message):
            influence_functions.damped_influence(
                model, data, train=data, damping=1e-4, curvature="hessian", solver=solver, params=some
            )


def test_mean_squared_error_has_a_gauss_newton_matrix() -> None:
    """l = (x'w - y)^2: H = 2/n X'X, g_i = 2 r_i x_i."""
    x, w = torch.randn(30, 4), torch.randn(4)
    y = x @ w + 0.3 * torch.randn(30)
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(w[None])
    found = influence_functions.damped_influence(model, (x, y), train=(x, y), damping=0.1, loss="mse")
    wide, r = x.double(), (x.double() @ w.double() - y.double())
    h = 2 / 30 * wide.T @ wide + 0.1 * torch.eye(4, dtype=torch.float64)
    g = 2 * r[:, None] * wide
    np.testing.assert_allclose(found[:], g @ torch.linalg.solve(h, g.T), rtol=1e-4, atol=1e-6)


def test_bad_influence_arguments() -> None:
    model, data = softmax_regression()
    call: Any = influence_functions.damped_influence
    with pytest.raises(ValueError, match=r"damping must be finite and greater than 0, got 0"):
        call(model, data, train=data, damping=0)
    with pytest.raises(ValueError, match="curvature must be one of"):
        call(model, data, train=data, damping=1, curvature="fisher")
    with pytest.raises(ValueError, match="solver must be one of"):
        call(model, data, train=data, damping=1, solver="lu")
    with pytest.raises(TypeError, match="train must be the data of the training loss, got NoneType"):
        call(model, data, train=None, damping=1)

    def own(model: nn.Module, batch: Data) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    with pytest.raises(ValueError, match="use curvature='hessian'"):
        call(model, data, train=data, damping=1, loss=own)
    expected, _ = exact_influence(model, data, 1.0)
    found = call(model, data, train=data, damping=1, loss=own, curvature="hessian")
    np.testing.assert_allclose(found[:], expected, atol=2e-5 * float(expected.abs().max()))
