"""The user's world comes back as it was: attributes, caches, modes, data, streams and torch's own modes."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import lossk
from lossk.analysis import baselines
from lossk.interop.weights import kernel_from_weights
from lossk.task.attributes import Attributes

Build = Callable[..., lossk.LossKernel]

CALLS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "predicted labels": lambda model, data: lossk.predicted_labels(model, data),
    "weights": lambda model, data: kernel_from_weights(
        [{name: p.detach() * scale for name, p in model.named_parameters()} for scale in (1.0, 1.1)],
        model, data, progress=False,
    ),
    "baseline": lambda model, data: baselines.gradient_cosine(model, data),
    "confusion": lambda model, data: baselines.confusion(model, data),
}  # fmt: skip


# --- modules that act on the switch ------------------------------------------------------------------------------


class Merging(nn.Linear):
    """A low-rank adapter that adds itself to its frozen base in eval mode, and takes itself out in training mode."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.randn(outputs, 2))
        self.merged = False

    def train(self, mode: bool = True) -> Merging:
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * (self.up @ self.down).detach()
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out if self.merged else out + x @ self.down.T @ self.up.T


class Adapted(nn.Linear):
    """The same function, without any switch."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.down.T @ self.up.T


def unmerged(model: Merging) -> Adapted:
    plain = Adapted(4, 3)
    plain.down, plain.up = nn.Parameter(model.down.detach().clone()), nn.Parameter(model.up.detach().clone())
    plain.load_state_dict(model.state_dict())
    plain.weight.requires_grad_(False)
    plain.bias.requires_grad_(False)
    return plain


@pytest.mark.parametrize("training", [True, False])
def test_an_adapter_that_merges_in_eval_mode_is_sampled(build: Build, problem: Any, training: bool) -> None:
    model = Merging(4, 3)
    plain = unmerged(model)
    model.train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kernel, expected = build(model, problem.data), build(plain, problem.data)
    assert (model.merged, model.training) == (not training, training)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    np.testing.assert_allclose(kernel.to_numpy(), expected.to_numpy(), atol=1e-3 * float(expected.variance.max()))
    model.train()
    F.cross_entropy(model(problem.inputs), problem.targets).backward()
    assert model.up.grad is not None


@pytest.mark.parametrize("call", CALLS)
def test_an_adapter_comes_back_after_every_call(problem: Any, call: str) -> None:
    model = Merging(4, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    CALLS[call](model, problem.data)
    assert model.training
    assert not model.merged
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_module_that_computes_otherwise_after_its_switch_is_switched(problem: Any, sgld: Any) -> None:
    """What `eval()` makes of it is what its user calls; setting its mode alone would give other losses."""

    class Prepared(nn.Linear):
        scale = 1.0

        def train(self, mode: bool = True) -> Prepared:
            self.scale = 1.0 if mode else 1.5
            return super().train(mode)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.scale

    model = Prepared(4, 3).train()
    kept = lossk.sample_losses(model, problem.data, sampler=sgld(lr=1e-30), num_chains=1, num_draws=2, progress=False)
    expected = F.cross_entropy(
        1.5 * F.linear(problem.inputs, model.weight, model.bias), problem.targets, reduction="none"
    )
    torch.testing.assert_close(kept.losses[0, 0], expected.detach(), rtol=1e-5, atol=1e-6)
    assert (model.scale, model.training) == (1.0, True)
    assert any(reason.startswith("eval mode = by eval()") for reason in kept.meta["passes_reasons"])


# --- attributes --------------------------------------------------------------------------------------------------


class Hoarder(nn.Linear):
    """Leaves something of every kind behind in its forward pass."""

    shared: list[int] = []  # noqa: RUF012 - a cache of the class, as people write it

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.flag, self.number, self.cache, self.table = False, 0, {}, torch.zeros(3)
        self.entries, self.window, self.kinds = [1], deque([1, 2], maxlen=3), {1}
        self.settings = SimpleNamespace(rope=None, inner=SimpleNamespace(keys=[]))
        self.array = np.zeros(2)
        self.generator, self.numpy = torch.Generator(), np.random.default_rng(1)
        self.hidden = [nn.Linear(1, 1)]  # no submodule
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.flag, self.number, self.late = True, self.number + 1, torch.ones(2)
        self.cache[x.shape[0]] = torch.arange(x.shape[0])
        self.table += 1
        self.entries.append(2)
        self.window.append(3)
        self.kinds.add(2)
        self.settings.rope = torch.ones(4)
        self.settings.inner.keys.append(1)
        self.array += 1
        torch.rand(1, generator=self.generator)
        self.numpy.random()
        self.hidden[0].weight.data += 1
        self.seen += 1
        self.shared.append(1)
        type(self).counter = getattr(type(self), "counter", 0) + 1
        torch.manual_seed(5)
        np.random.seed(5)  # noqa: NPY002
        random.seed(5)
        self.register_forward_hook(lambda module, args, out: None)
        return super().forward(x)


def portrait(model: Hoarder) -> dict[str, Any]:
    """All of it, by value."""
    return {
        "plain": (model.flag, model.number, model.cache, model.entries, list(model.window), model.kinds, model.shared),
        "settings": (model.settings.rope, list(model.settings.inner.keys)),
        "tensors": [t.tolist() for t in (model.table, model.seen, model.hidden[0].weight)] + [model.array.tolist()],
        "streams": (model.generator.get_state().tolist(), str(model.numpy.bit_generator.state)),
        "keys": (sorted(vars(model)), hasattr(Hoarder, "counter"), len(model._forward_hooks)),
        "global": (torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()),  # noqa: NPY002
    }


@pytest.mark.parametrize("call", [*CALLS, "build", "interrupted"])
def test_what_a_forward_pass_leaves_behind_is_taken_away(build: Build, problem: Any, fail_at: Any, call: str) -> None:
    model = Hoarder()
    before = portrait(model)
    before = {key: eval(repr(value)) if key == "plain" else value for key, value in before.items()}
    if call == "build":
        build(model, problem.data)
    elif call == "interrupted":
        with pytest.raises(KeyboardInterrupt):
            build(model, problem.data, loss=fail_at(30, KeyboardInterrupt))
    else:
        CALLS[call](model, problem.data)
    after = portrait(model)
    for key, value in before.items():
        assert after[key] == value, key


def test_hook_style_pruning_comes_back(build: Build, problem: Any) -> None:
    """`.weight` is a plain attribute there, computed by a hook."""
    model = problem.model()
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    weight = model[0].weight
    build(model, problem.data)
    assert model[0].weight is weight
    assert torch.equal(weight, model[0].weight_orig * model[0].weight_mask)


def test_large_containers_are_put_back_unread() -> None:
    model = nn.Linear(1, 1)
    model.paths = [str(i) for i in range(100_000)]
    held = Attributes(model)
    model.paths.append("more")
    assert held.changed() == ["model.paths"]
    held.restore()
    assert len(model.paths) == 100_000


# --- data --------------------------------------------------------------------------------------------------------


class Clamping(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp_(min=0))


class Halving(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.div_(2))


def rectified_first() -> nn.Module:
    return nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3))


def in_place(x: Tensor) -> Tensor:
    return x.sub_(0.5)


@pytest.mark.parametrize("loader", [False, True], ids=["tensors", "loader"])
@pytest.mark.parametrize(
    ("make", "transform", "pure"),
    [
        (lambda: Clamping(4, 3), None, lambda x: x.clamp(min=0)),
        (lambda: Halving(4, 3), None, lambda x: x / 2),
        (rectified_first, None, lambda x: x.relu()),
        (lambda: nn.Linear(4, 3), in_place, lambda x: x - 0.5),
    ],
    ids=["clamp_", "div_", "ReLU(inplace=True)", "transform"],
)
def test_data_are_not_written_into(
    build: Build, problem: Any, make: Any, transform: Any, pure: Any, loader: bool
) -> None:
    """And the kernel is that of the same function written without it: every pass sees the data as they came."""
    model = make()
    inputs, targets = problem.inputs.clone(), problem.targets
    data: Any = (inputs, targets)
    if loader:
        data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, targets), batch_size=5)
    kernel = build(model, data, transform=transform)
    assert torch.equal(inputs, problem.inputs)
    linear = model[1] if isinstance(model, nn.Sequential) else model
    plain = nn.Linear(4, 3)
    plain.load_state_dict(linear.state_dict())
    expected = build(plain, (pure(problem.inputs), targets))
    np.testing.assert_allclose(kernel.to_numpy(), expected.to_numpy(), atol=1e-3 * float(expected.variance.max()))


def test_a_loss_may_take_its_batch_apart(build: Build, problem: Any) -> None:
    """`batch.pop("labels")`, as people write it; every pass gets a batch of its own."""

    def popping(model: nn.Module, batch: Any) -> Tensor:
        labels = batch.pop("labels")
        return F.cross_entropy(model(**batch), labels, reduction="none")

    class Named(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    model = Named(4, 3)
    kernel = build(model, {"x": problem.inputs, "labels": problem.targets}, loss=popping)
    plain = nn.Linear(4, 3)
    plain.load_state_dict(model.state_dict())
    expected = build(plain, problem.data)
    np.testing.assert_allclose(kernel.to_numpy(), expected.to_numpy(), atol=1e-3 * float(expected.variance.max()))


# --- torch's own modes -------------------------------------------------------------------------------------------


@contextmanager
def no_modes() -> Iterator[None]:
    yield


@pytest.mark.parametrize(
    "mode",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
def test_the_callers_modes_change_no_number(build: Build, problem: Any, assert_same_kernel: Any, mode: Any) -> None:
    model = problem.model()
    expected = build(model, problem.data)
    with mode():
        was = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
        kernel = build(model, problem.data)
        labels = lossk.predicted_labels(model, problem.data)[1]
        now = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
        assert now == was
    assert_same_kernel(kernel, expected)
    assert torch.equal(labels, lossk.predicted_labels(model, problem.data)[1])
