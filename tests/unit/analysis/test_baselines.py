"""Baselines against closed forms and slow loops in float64; the model comes back bit-identical from each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lossk
from frozen_network import Data, entropy, images, network, wide_gradients
from lossk.analysis import baselines, influence_functions
from lossk.analysis.baselines import Baseline
from lossk.analysis.gradients import Sketch
from small_networks import Tally


@pytest.fixture
def data() -> Data:
    return images()


def cosine(g: Tensor) -> Tensor:
    g = g / g.norm(dim=1, keepdim=True)
    return g @ g.T


# --- gradients ---------------------------------------------------------------------------------------------------


def test_gradient_cosine_is_that_of_a_loop_in_float64(data: Data) -> None:
    """float32 gradients of ~50 sums of products: relative error some 1e-6, here bounded by 2e-5 of unit vectors."""
    found = baselines.gradient_cosine(network(), data, dimensions=None)
    g = wide_gradients(network(), data, entropy)
    assert found.noise == 0.0
    np.testing.assert_allclose(found.correlation(), cosine(g), atol=2e-5)
    np.testing.assert_allclose(found[:], g @ g.T, rtol=1e-4, atol=1e-5 * float((g @ g.T).diagonal().max()))
    norms = baselines.gradient_norms(network(), data)
    np.testing.assert_allclose(norms, g.norm(dim=1), rtol=2e-5)
    np.testing.assert_allclose(found.variance, norms**2, rtol=1e-5)


def test_gradients_of_some_parameters(data: Data) -> None:
    found = baselines.gradient_cosine(network(), data, dimensions=None, params=["7.*"])
    assert found.features.shape == (13, 18)
    g = wide_gradients(network(), data, entropy)[:, -18:]
    np.testing.assert_allclose(found.correlation(), cosine(g), atol=2e-5)


class Branching(nn.Module):
    """What cannot be vectorised: a decision on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if bool(x.sum() > 0) else self.layer(-2 * x)


def test_a_model_that_cannot_be_vectorised_is_taken_sample_by_sample() -> None:
    x, y = torch.randn(1, 4).repeat(6, 1) * torch.linspace(0.5, 2, 6)[:, None], torch.arange(6) % 3
    model = Branching()
    found = baselines.gradient_cosine(model, (x, y), dimensions=None)
    np.testing.assert_allclose(found.correlation(), cosine(wide_gradients(model, (x, y), entropy)), atol=2e-5)


def test_a_small_loss_has_a_direction() -> None:
    """At a loss of 1e-20 the float32 softmax is exactly one-hot: its gradient would be 0, or rounding."""
    model = nn.Linear(2, 3, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[46.0, 0.0], [0.0, 0.0], [0.0, 3.0]]))
    x, y = torch.tensor([[1.0, 0.0], [1.0, 0.5]]), torch.tensor([0, 0])

    def exact(logits: Tensor, label: Tensor) -> Tensor:
        return F.softplus(logits[1:].logsumexp(0) - logits[label])  # both labels are 0

    found = baselines.gradient_cosine(model, (x, y), dimensions=None)
    assert not found.dead.any()
    np.testing.assert_allclose(found.correlation(), cosine(wide_gradients(model, (x, y), exact)), atol=1e-5)


def test_a_sketch_keeps_inner_products() -> None:
    """Unbiased with variance at most (1 + c^2) / d for unit vectors, over seeds; heavy coordinates included."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3000)) * np.exp(2 * rng.standard_normal(3000))
    x[1] += 0.7 * x[0]
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    c, d, seeds = float(x[0] @ x[1]), 64, 400
    products = []
    for seed in range(seeds):
        a, b = Sketch(3000, d, seed)(torch.from_numpy(x).float()).double()
        products.append(float(a @ b))
    bound = (1 + c**2) / d
    assert abs(np.mean(products) - c) < 4.5 * (bound / seeds) ** 0.5
    assert np.var(products) < bound * (1 + 4.5 * (2 / seeds) ** 0.5)
    assert np.var(products) > bound / 10, "a projection that loses nothing is none"


def test_a_sketched_cosine_is_within_its_error(data: Data) -> None:
    g = cosine(wide_gradients(network(), data, entropy))
    found = baselines.gradient_cosine(network(), data, dimensions=128, seed=3)
    again = baselines.gradient_cosine(network(), data, dimensions=128, seed=3)
    other = baselines.gradient_cosine(network(), data, dimensions=128, seed=4)
    assert torch.equal(found.features, again.features)
    assert not torch.equal(found.features, other.features)
    assert found.features.shape == (13, 128)
    error = (found.correlation().double() - g)[~torch.eye(13, dtype=torch.bool)]
    assert float(error.square().mean().sqrt()) < 2 * found.noise
    whole = baselines.gradient_cosine(network(), data, dimensions=100_000)
    np.testing.assert_allclose(whole.correlation(), g, atol=2e-5)
    with pytest.raises(ValueError, match="dimensions must be a positive multiple of 4, got 30"):
        baselines.gradient_cosine(network(), data, dimensions=30)


# --- features, inputs, confusion ---------------------------------------------------------------------------------


def test_features_are_the_inputs_of_the_last_linear(data: Data) -> None:
    model = network().eval()
    with torch.no_grad():
        expected = model[:7](data[0])
        hidden = model[:5](data[0])
    found = baselines.penultimate_features(network(), data)
    np.testing.assert_allclose(found.correlation(), cosine(expected), atol=1e-5)
    np.testing.assert_allclose(baselines.penultimate_features(network(), data, layer="5").features, hidden, rtol=1e-5)
    centred = baselines.penultimate_features(network(), data, centred=True)
    np.testing.assert_allclose(centred.features, expected - expected.mean(dim=0), atol=1e-6)
    with pytest.raises(ValueError, match="layer must name a module of the model, got 'head'"):
        baselines.penultimate_features(network(), data, layer="head")
    with pytest.raises(ValueError, match=r"must call an nn\.Linear"):
        baselines.penultimate_features(nn.Sequential(nn.Flatten(), nn.PReLU()), data)


def test_raw_inputs_are_flattened(data: Data) -> None:
    found = baselines.raw_inputs(data)
    np.testing.assert_allclose(found.correlation(), cosine(data[0].flatten(1)), atol=1e-5)
    with pytest.raises(ValueError, match=r"inputs must be of one size.*\[16, 25\]"):
        baselines.raw_inputs(lossk.ProbeSets(a=data, b=(torch.randn(3, 1, 5, 5), torch.zeros(3).long())))


def test_confusion_is_of_classes(data: Data) -> None:
    model = network()
    found, p = baselines.confusion(model, data)
    guesses = lossk.predicted_labels(model, data)[1]
    counts = np.zeros((3, 3))
    for y, guess in zip(data[1].tolist(), guesses.tolist(), strict=True):
        counts[y, guess] += 1
    shares = counts / counts.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(p, shares)
    m = (shares + shares.T) / 2
    np.testing.assert_allclose(found[:], m[data[1]][:, data[1]], rtol=1e-6)
    soft, q = baselines.confusion(model, data, soft=True)
    np.testing.assert_allclose(q.sum(dim=1), 1.0)
    assert soft.name != found.name


# --- a baseline reads like a kernel ------------------------------------------------------------------------------


def test_it_reads_as_the_kernel_of_its_vectors() -> None:
    """Centered traces are vectors: a LossKernel of them and a Baseline of them give the same numbers."""
    losses = torch.randn(1, 9, 21)
    losses[..., 4] = 1.0
    kernel = lossk.LossKernel.from_traces(lossk.LossTraces(losses, sets={"a": slice(0, 8), "b": slice(8, 21)}))
    vectors = (losses[0] - losses[0].mean(dim=0)).T / 8**0.5
    base = Baseline("traces", vectors.clone(), sets=kernel.sets, tile=5)
    assert len(base) == base.num_samples == 21
    np.testing.assert_allclose(base[3:9, [1, 4]], kernel[3:9, [1, 4]], atol=1e-5)
    np.testing.assert_allclose(base.correlation(), kernel.correlation(), atol=1e-5)
    np.testing.assert_array_equal(base.dead, kernel.dead)
    np.testing.assert_allclose(base.variance, kernel.variance, atol=1e-6)
    v = torch.randn(21, 2)
    np.testing.assert_allclose(base.matvec(v), kernel.matvec(v), atol=1e-5)
    assert base.matvec(v[:, 0]).shape == (21,)
    for rows in (None, [2, 4, 20]):
        mine, its = base.neighbors(4, rows), kernel.neighbors(4, rows)
        np.testing.assert_array_equal(mine.index, its.index)
        np.testing.assert_allclose(mine.correlation, its.correlation, atol=1e-5)
        assert not mine.noise_floor.any()
    block = base.correlation(base.sets["b"], base.sets["a"])
    assert block.shape == (13, 8)


def test_bad_vectors_and_requests_are_refused() -> None:
    with pytest.raises(ValueError, match=r"features must be floating point \[N, d\]"):
        Baseline("x", torch.zeros(3))
    with pytest.raises(ValueError, match="duals of the features' shape"):
        Baseline("x", torch.zeros(3, 2), duals=torch.zeros(3, 4))
    bad = torch.zeros(3, 2)
    bad[1, 0] = torch.nan
    with pytest.raises(ValueError, match=r"features must be finite; those of sample 1 are not \(x\)"):
        Baseline("x", bad)
    base = Baseline("x", torch.randn(3, 2))
    with pytest.raises(ValueError, match="k must be an integer from 1 to N - 1 = 2, got 3"):
        base.neighbors(3)
    with pytest.raises(IndexError, match="out of range"):
        base.correlation(5)
    with pytest.raises(ValueError, match=r"v must have shape \[3\]"):
        base.matvec(torch.zeros(4))


def test_knn_disagreement_finds_the_odd_label() -> None:
    features = torch.cat([torch.randn(20, 3) + 9 * torch.eye(3)[c] for c in range(3)])
    labels = torch.arange(3).repeat_interleave(20)
    labels[7] = 2
    score = baselines.knn_disagreement(Baseline("planted", features), labels, k=5)
    assert int(score.argmax()) == 7
    assert float(score[7]) == 1.0


# --- the model comes back ----------------------------------------------------------------------------------------

CALLS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "features": baselines.penultimate_features,
    "gradient cosine": baselines.gradient_cosine,
    "gradient norms": baselines.gradient_norms,
    "confusion": baselines.confusion,
    "influence": lambda model, data: influence_functions.damped_influence(
        model, data, train=data, damping=0.5, params=["7.*"]
    ),
    "influence by cg": lambda model, data: influence_functions.damped_influence(
        model, data, train=data, damping=0.5, solver="cg", params=["7.*"]
    ),
    "hessian": lambda model, data: influence_functions.damped_influence(
        model, data, train=data, damping=2.0, curvature="hessian", params=["7.*"]
    ),
}


def state(model: nn.Module) -> list[Any]:
    tensors = [t.detach().clone() for t in model.state_dict().values()]
    flags = [(p.requires_grad, None if p.grad is None else p.grad.clone(), p.data_ptr()) for p in model.parameters()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    return [tensors, flags, [m.training for m in model.modules()], hooks]


def assert_same_state(before: list[Any], after: list[Any]) -> None:
    for a, b in zip(before[0], after[0], strict=True):
        assert torch.equal(a, b)
    for (flag, grad, at), (flag_after, grad_after, at_after) in zip(before[1], after[1], strict=True):
        assert (flag, at) == (flag_after, at_after)
        assert (grad is None) == (grad_after is None)
        assert grad is None or torch.equal(grad, grad_after)
    assert before[2:] == after[2:]


class Interrupting(nn.Module):
    """Passes its input on until told to raise."""

    def __init__(self) -> None:
        super().__init__()
        self.tally, self.at = Tally(), -1

    def forward(self, x: Tensor) -> Tensor:
        self.tally.count += 1
        if self.tally.count == self.at:
            raise KeyboardInterrupt
        return x


@pytest.mark.parametrize("name", CALLS)
def test_the_model_comes_back_bit_identical(name: str, data: Data) -> None:
    """Also where it is interrupted at the last pass, with the modes and gradients it had."""
    stop = Interrupting()
    model = nn.Sequential(*network(), stop).train()
    model[5].eval()
    model[0].weight.requires_grad_(False)
    model[1].bias.grad = torch.ones(3)
    before = state(model)
    CALLS[name](model, data)
    assert_same_state(before, state(model))
    stop.at, stop.tally.count = stop.tally.count, 0
    with pytest.raises(KeyboardInterrupt):
        CALLS[name](model, data)
    assert_same_state(before, state(model))


def test_losses_per_token_are_refused() -> None:
    model = nn.Sequential(nn.Embedding(5, 6), nn.Linear(6, 5))
    tokens = torch.randint(0, 5, (4, 3))
    with pytest.raises(ValueError, match="one per sample for a baseline, got one per token"):
        baselines.gradient_cosine(model, (tokens, tokens), loss="token_cross_entropy")
    with pytest.raises(ValueError, match="one row per sample"):
        baselines.penultimate_features(model, (tokens, tokens))


def test_bad_data_are_named() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"targets must lie in \[0, 2\)"):
        baselines.gradient_cosine(model, (torch.randn(4, 3), torch.full((4,), 7)))
    with pytest.raises(TypeError, match="must be a DataLoader"):
        baselines.raw_inputs(7)
