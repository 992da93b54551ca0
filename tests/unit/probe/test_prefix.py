"""The frozen prefix: the same kernel with and without it, its layers run once, and cuts that would be wrong refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lossk
from conftest import sgld
from small_networks import Counted, vectors
from token_problems import TokenModel, text

Build = Callable[..., lossk.LossKernel]
OFF = lossk.Passes(frozen_prefix=False)


class Residual(nn.Module):
    """A convolutional network of two residual blocks with batch norm, whose skips cross no boundary of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))
        self.layer1, self.layer2 = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + torch.relu(self.norms[0](self.layer1(x)))
        x = x + torch.relu(self.norms[1](self.layer2(x)))
        return self.fc(self.dropout(x.mean((2, 3))))


class Branching(nn.Module):
    """Control flow on values, which cannot be traced; `body` and then `head`."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.head = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        if float(x.abs().sum()) < 0:
            x = -x
        return self.head(x.relu())


class Named(nn.Module):
    """Takes keywords, one of them left out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, scale: Tensor | None = None, twice: bool = False) -> Tensor:
        x = self.first(x) if scale is None else self.first(x) * scale
        return self.last(x.relu() * 2 if twice else x.relu())


def images(num_samples: int = 11) -> tuple[Tensor, Tensor]:
    return torch.randn(num_samples, 1, 6, 6), torch.arange(num_samples) % 3


def reason(kernel: lossk.LossKernel) -> str:
    """What was said of the prefix."""
    (found,) = [line for line in kernel.meta["passes_reasons"] if line.startswith("frozen prefix")]
    return found


def assert_cached_and_the_same(
    build: Build, model: nn.Module, data: Any, params: list[str], how: str, **changes: Any
) -> None:
    asked = {"sampler": sgld(params=params), **changes}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cached = build(model, data, **asked)
    assert how in reason(cached), reason(cached)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    whole = build(model, data, passes=OFF, **asked)
    expected = whole.to_numpy()
    # The prefix in batches of another composition may differ in the last bits; K holds squares of deviations.
    np.testing.assert_allclose(cached.to_numpy(), expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert np.abs(expected).max() > 0


# --- cached ------------------------------------------------------------------------------------------------------


def test_the_last_layer_of_a_sequence(build: Build) -> None:
    counted = Counted()
    model = nn.Sequential(nn.Linear(4, 8), counted, nn.ReLU(), nn.Linear(8, 3))
    data = vectors()
    build(model, data, sampler=sgld(params=["3.*"]))
    checks = counted.tally.count
    counted.tally.count = 0
    build(model, data, sampler=sgld(params=["3.*"]), num_draws=40)
    assert counted.tally.count == checks  # the same with many more draws: nothing but the checks and one pass
    assert_cached_and_the_same(build, model, data, ["3.*"], "before module '3' runs once")


@pytest.mark.parametrize("params", [["layer2.*", "fc.*"], ["fc.*"], ["norms.1.*"]])
def test_a_network_with_skips(build: Build, params: list[str]) -> None:
    assert_cached_and_the_same(build, Residual(), images(), params, "run once")


def test_training_data_of_their_own(build: Build) -> None:
    assert_cached_and_the_same(build, Residual(), images(), ["fc.*"], "run once", train=images(17))


def test_several_probe_sets(build: Build) -> None:
    sets = lossk.ProbeSets(a=images(5), b=images(6))
    assert_cached_and_the_same(build, Residual(), sets, ["fc.*"], "run once", train=images(9))


def test_a_model_that_cannot_be_traced_is_cut_at_its_smallest_module(build: Build) -> None:
    assert_cached_and_the_same(build, Branching(), vectors(), ["head.*"], "everything before module 'head' runs once")
    assert_cached_and_the_same(
        build, Branching(), vectors(), ["head.2.*"], "everything before module 'head.2' runs once"
    )


def test_a_module_by_name(build: Build) -> None:
    kernel = build(Branching(), vectors(), sampler=sgld(params=["head.2.*"]), passes=lossk.Passes(frozen_prefix="head"))
    assert "module 'head' runs once" in reason(kernel)


def test_losses_per_token(build: Build) -> None:
    assert_cached_and_the_same(build, TokenModel(), text(), ["head.*"], "run", loss="token_cross_entropy")


def test_regression(build: Build) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    assert_cached_and_the_same(build, model, (torch.randn(9, 4), torch.randn(9, 2)), ["2.*"], "run once", loss="mse")


@pytest.mark.parametrize("form", ["tuple", "mapping"])
def test_inputs_of_several_arguments(build: Build, form: str) -> None:
    x, y = vectors()
    inputs: Any = (x, torch.rand(len(x), 1)) if form == "tuple" else {"x": x}
    assert_cached_and_the_same(build, Named(), (inputs, y), ["last.*"], "run")
    assert isinstance(inputs, tuple | Mapping)


def test_other_samplers(build: Build) -> None:
    model, data = Residual(), images()
    for sampler in (
        lossk.HMC(step_size=0.01, num_leapfrog_steps=2, localization=5.0, n_beta=30.0, params=["fc.*"]),
        lossk.Laplace(n_beta=30.0, localization=5.0, params=["fc.*"]),
    ):
        cached = build(model, data, sampler=sampler).to_numpy()
        whole = build(model, data, sampler=sampler, passes=OFF).to_numpy()
        np.testing.assert_allclose(cached, whole, rtol=0, atol=1e-4 * np.abs(whole).max())


# --- not cached --------------------------------------------------------------------------------------------------


def test_all_weights_sampled_says_nothing(build: Build) -> None:
    kernel = build(Residual(), images())
    assert not any(line.startswith("frozen prefix") for line in kernel.meta["passes_reasons"])


def test_the_first_layer_sampled(build: Build) -> None:
    kernel = build(Residual(), images(), sampler=sgld(params=["stem.*"]))
    assert "not cached: no layer lies before the sampled weights" in reason(kernel)


def test_a_loss_of_ones_own(build: Build) -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none") * batch[0].mean((1, 2, 3)).exp()

    kernel = build(Residual(), images(), loss=loss, sampler=sgld(params=["fc.*"]))
    assert "cached: 5 calls of frozen modules run once (stem to norms.1)" in reason(kernel), reason(kernel)


def test_what_does_not_fit_is_not_kept(build: Build) -> None:
    kernel = build(
        Residual(), images(), sampler=sgld(params=["fc.*"]), passes=lossk.Passes(prefix_bytes=11 * 4 * 4 - 1)
    )
    assert "not cached: the activations need" in reason(kernel)
    kernel = build(Residual(), images(), sampler=sgld(params=["fc.*"]), passes=lossk.Passes(prefix_bytes=11 * 4 * 4))
    assert "= cached" in reason(kernel)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)
        self.gain = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).mul_(self.gain))


def test_a_rest_that_writes_into_the_activations(build: Build) -> None:
    kernel = build(InPlace(), vectors(), sampler=sgld(params=["gain", "last.*"]))
    assert "not cached" in reason(kernel)


def test_a_model_that_uses_its_input_again(build: Build) -> None:
    """The cut at `head` would lose what the model adds afterwards; tracing fails; but a module's output is kept."""

    class Added(Branching):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x[:, :3]

    kernel = build(Added(), vectors(), sampler=sgld(params=["head.*"]))
    assert "cached: 1 call of frozen modules run once (body)" in reason(kernel)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "frozen_prefix must be a bool or the name of a module, got 'nowhere'"),
        ("body", "module 'body' must hold all sampled parameters"),
    ],
)
def test_names_that_cannot_be(build: Build, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(Branching(), vectors(), sampler=sgld(params=["head.*"]), passes=lossk.Passes(frozen_prefix=name))


def test_a_named_cut_that_is_wrong_is_refused(build: Build) -> None:
    class Doubled(Branching):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    with pytest.raises(ValueError, match="the halves do not give what the whole model gives"):
        build(Doubled(), vectors(), sampler=sgld(params=["head.*"]), passes=lossk.Passes(frozen_prefix="head"))
