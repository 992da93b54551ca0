"""Kernels from given weights, whoever drew them; lossk's SGLD as a posteriors-style transform."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

import lossk
from lossk.interop.posteriors import build, kernel_from_weights
from lossk.ops.philox import normals

DATA = (torch.randn(20, 3, generator=torch.Generator().manual_seed(1)), torch.arange(20) % 2)


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    model(DATA[0])  # running statistics
    return model.train()


def states(count: int, seed: int = 0) -> Iterator[dict[str, Tensor]]:
    """Weights around the network's, in tensors that are used again."""
    generator, model = torch.Generator().manual_seed(seed), network()
    reused = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(count):
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            reused[name].copy_(parameter.detach() + 0.1 * noise)
        yield reused


def true_losses(count: int, seed: int = 0) -> Tensor:
    rows = []
    for state in states(count, seed):
        model = network()
        model.load_state_dict(state)
        with torch.no_grad():
            rows.append(F.cross_entropy(model.eval()(DATA[0]), DATA[1], reduction="none"))
    return torch.stack(rows)


def same(a: lossk.LossKernel, b: lossk.LossKernel) -> None:
    torch.testing.assert_close(a[:], b[:], rtol=1e-4, atol=1e-7)


def test_state_dicts_of_several_chains() -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kernel = kernel_from_weights([states(6, 0), states(6, 1)], model, DATA, progress=False)
    losses = torch.stack([true_losses(6, 0), true_losses(6, 1)])
    same(kernel, lossk.LossKernel.from_traces(lossk.LossTraces(losses)))
    assert kernel.num_chains == 2
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_flat_tensors_and_part_of_the_parameters() -> None:
    model = network()
    weights = []
    for state in states(5):
        model.load_state_dict(state)
        weights.append(parameters_to_vector(model.parameters()).detach())
    flat = kernel_from_weights(iter(weights), network(), DATA, progress=False)
    same(flat, lossk.LossKernel.from_traces(lossk.LossTraces(true_losses(5).unsqueeze(0))))
    part = [{"3.bias": torch.tensor([float(i), -1.0])} for i in range(3)]
    found = kernel_from_weights(part, network(), DATA, progress=False, centering="pooled")
    model, rows = network().eval(), []
    with torch.no_grad():
        for state in part:
            model[3].bias.copy_(state["3.bias"])
            rows.append(F.cross_entropy(model(DATA[0]), DATA[1], reduction="none"))
    traces = lossk.LossTraces(torch.stack(rows).unsqueeze(0))
    same(found, lossk.LossKernel.from_traces(traces, centering="pooled"))


def test_what_a_state_leaves_out_is_the_models_own() -> None:
    """The buffers of one state do not stay for the next."""
    whole = {name: value.clone() for name, value in network().state_dict().items()}
    moved = whole | {"1.running_mean": whole["1.running_mean"] + 3.0}
    kernel = kernel_from_weights([moved, {}, whole], network(), DATA, progress=False)
    level = kernel.mean_loss
    alone = kernel_from_weights([whole, whole], network(), DATA, progress=False).mean_loss
    other = kernel_from_weights([moved, moved], network(), DATA, progress=False).mean_loss
    torch.testing.assert_close(level, (other + 2 * alone) / 3, rtol=1e-6, atol=1e-7)


def test_parameters_without_grad_come_back_too() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.detach().clone()
    kernel = kernel_from_weights([{"0.weight": before + i} for i in (1.0, 2.0)], model, DATA, progress=False)
    assert float(kernel.variance.max()) > 0
    assert torch.equal(model[0].weight, before)
    assert not model[0].weight.requires_grad


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (
            [{"no.such": torch.zeros(1)}] * 2,
            ValueError,
            "chain 0, draw 0: the model has no parameter or buffer 'no.such'",
        ),
        ([{"3.bias": torch.zeros(3)}] * 2, ValueError, r"draw 0: '3.bias' must have shape \[2\], got \[3\]"),
        ([torch.zeros(3)] * 2, ValueError, r"a flat state must have shape \[34\], got \[3\]"),
        ([{}, "x"], TypeError, "draw 1: a state must be"),
        ([{}], ValueError, "at least 2 draws"),
        ([iter([{}] * 2), iter([{}] * 3)], ValueError, r"as many in each, got \[2, 3\]"),
        ({}, TypeError, "weights must be an iterable"),
        (
            [{}, {"3.bias": torch.tensor([float("nan"), 0.0])}],
            ValueError,
            r"chain 0, draw 1: '3.bias' must be finite, entry \[0\] is nan",
        ),
        (
            [{}, {"3.weight": torch.full((2, 4), 3e38)}],
            ValueError,
            r"chain 0, draw 1: probe sample \d+ has loss (nan|inf)",
        ),
    ],
)
def test_bad_weights(weights: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        kernel_from_weights(weights, network(), DATA, progress=False)


# -- the transform ----------------------------------------------------------------------------------------------------


def quadratic(params: dict[str, Tensor], batch: Tensor) -> tuple[Tensor, str]:
    """log p = -sum(curvature w^2) / 2 with curvatures 1 and 4."""
    return -0.5 * (params["a"].square().sum() + 4.0 * params["b"].square().sum()), "aux"


def start() -> dict[str, Tensor]:
    return {"a": torch.full((40, 50), 0.5), "b": torch.zeros(2000)}


def test_the_step_is_the_formula() -> None:
    transform = build(quadratic, lr=0.01, temperature=2.0, localization=0.5, seed=3, chain=1)
    state = transform.init(start())
    new, aux = transform.update(state, None)
    xi = normals(3, 1, 0, 4000)
    a, b = xi[:2000].view(40, 50), xi[2000:]
    torch.testing.assert_close(new.params["a"], 0.5 - 0.01 * 0.5 + 0.2 * a, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(new.params["b"], 0.2 * b, rtol=1e-6, atol=1e-6)
    assert aux == "aux"
    assert float(new.log_posterior) == -250.0
    assert int(new.step) == 1
    assert torch.equal(state.params["a"], start()["a"])  # not in place
    again, _ = transform.update(new, None)
    shifted = new.params["b"] * (1 - 0.04) - 0.01 * 2.0 * 0.5 * new.params["b"] + 0.2 * normals(3, 1, 1, 4000)[2000:]
    torch.testing.assert_close(again.params["b"], shifted, rtol=1e-5, atol=1e-6)


def test_in_place_is_the_same_chain() -> None:
    transform = build(quadratic, lr=lambda step: 0.01 / (1 + float(step)), temperature=lambda step: 1.0)
    a, b = transform.init(start()), transform.init(start())
    for _ in range(3):
        a, _ = transform.update(a, None)
        b, _ = transform.update(b, None, inplace=True)
    assert torch.equal(a.params["a"], b.params["a"])
    assert int(b.step) == 3


def test_it_samples_the_tempered_law() -> None:
    """Variance T / curvature, with Euler's factor 1 / (1 - lr curvature / 2)."""
    transform = build(quadratic, lr=0.1, temperature=0.25)
    state = transform.init({"a": torch.zeros(2000), "b": torch.zeros(2000)})
    for _ in range(60):
        state, _ = transform.update(state, None, inplace=True)
    for name, curvature in (("a", 1.0), ("b", 4.0)):
        expected = 0.25 / curvature / (1 - 0.1 * curvature / 2)
        expected *= 1 - (1 - 0.1 * curvature) ** 120
        assert abs(float(state.params[name].var()) / expected - 1) < 5 * (2 / 2000) ** 0.5


def test_its_draws_make_a_kernel() -> None:
    model = network().eval()

    def log_posterior(params: dict[str, Tensor], batch: Any) -> tuple[Tensor, None]:
        outputs = torch.func.functional_call(model, params, (batch[0],))
        return -F.cross_entropy(outputs, batch[1]), None

    transform = build(log_posterior, lr=1e-4, temperature=0.1)

    def draws() -> Iterator[dict[str, Tensor]]:
        state = transform.init(dict(model.named_parameters()))
        for _ in range(4):
            state, _ = transform.update(state, DATA, inplace=True)
            yield state.params

    kernel = kernel_from_weights(draws(), model, DATA, progress=False)
    assert kernel.num_draws == 4
    assert float(kernel.variance.min()) > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.0}, "lr must be"),
        ({"temperature": -1.0}, "temperature must be"),
        ({"localization": -1.0}, "localization"),
    ],
)
def test_bad_settings(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(quadratic, **({"lr": 0.1} | changes))
    with pytest.raises(ValueError, match="params must be a tree"):
        build(quadratic, lr=0.1).init({"a": torch.zeros(2, dtype=torch.int64)})
