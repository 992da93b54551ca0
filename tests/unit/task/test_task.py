"""The model comes back as it was, whatever happens; frozen semantics; every kind of data gives the same samples."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import lossk

Build = Callable[..., lossk.LossKernel]
Same = Callable[[lossk.LossKernel, lossk.LossKernel], None]


class Mixed(nn.Module):
    """Batch norm, dropout, tied, frozen, non-contiguous and zero-dimensional parameters, a non-persistent buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.dropout = nn.Dropout(0.5)
        self.square = nn.Linear(6, 6, bias=False)
        self.tied = nn.Linear(6, 6, bias=False)
        self.tied.weight = self.square.weight
        self.head = nn.Parameter(torch.randn(3, 6).t())  # [6, 3], strides (1, 6)
        self.frozen = nn.Linear(6, 6)
        self.frozen.requires_grad_(False)
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("seen", torch.arange(3.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1  # a module may keep count whatever its mode
        x = self.dropout(torch.tanh(self.norm(self.first(x))))
        x = torch.tanh(self.tied(torch.tanh(self.square(x)))) + 0.1 * self.frozen(x)
        return self.gain * x @ self.head


@pytest.fixture
def mixed() -> Mixed:
    """In training mode but for one submodule, with a gradient on some parameters only and a hook."""
    model = Mixed()
    model(torch.randn(50, 4)).sum().backward()  # moves the running statistics; leaves gradients
    model.first.weight.grad = None
    model.train()
    model.frozen.eval()
    model.dropout.register_forward_hook(lambda module, args, output: None)
    return model


class Snapshot:
    """Everything about a model that a call must leave alone."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parameters = {n: p for n, p in model.named_parameters(remove_duplicate=False)}  # noqa: C416
        self.buffers = dict(model.named_buffers(remove_duplicate=False))
        self.values = {n: t.detach().clone() for n, t in self.tensors().items()}
        self.storage = {n: (t.data_ptr(), t.stride(), t.dtype, t.device) for n, t in self.tensors().items()}
        self.modes = {n: m.training for n, m in model.named_modules()}
        self.requires_grad = {n: p.requires_grad for n, p in self.parameters.items()}
        self.grads = {n: p.grad for n, p in self.parameters.items()}
        self.grad_values = {n: None if g is None else g.clone() for n, g in self.grads.items()}
        self.hooks = {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()}
        self.keys = list(model.state_dict())

    def tensors(self) -> dict[str, Tensor]:
        return {**self.parameters, **self.buffers}

    def assert_untouched(self) -> None:
        now = dict(self.model.named_parameters(remove_duplicate=False))
        assert list(now) == list(self.parameters)
        buffers = dict(self.model.named_buffers(remove_duplicate=False))
        for name, tensor in self.tensors().items():
            current = now[name] if name in now else buffers[name]
            assert current is tensor, f"{name} is another tensor object"
            assert (tensor.data_ptr(), tensor.stride(), tensor.dtype, tensor.device) == self.storage[name], name
            assert torch.equal(tensor, self.values[name]), f"{name} changed"
        assert {n: m.training for n, m in self.model.named_modules()} == self.modes
        for name, parameter in self.parameters.items():
            assert isinstance(parameter, nn.Parameter)
            assert parameter.is_leaf
            assert parameter.requires_grad == self.requires_grad[name], name
            assert parameter.grad is self.grads[name], f"{name}.grad was replaced"
            if parameter.grad is not None:
                assert torch.equal(parameter.grad, self.grad_values[name]), f"{name}.grad changed"  # type: ignore[arg-type]
        hooks = {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in self.model.named_modules()}
        assert hooks == self.hooks
        assert list(self.model.state_dict()) == self.keys


# --- restoring ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patterns", [None, ["frozen.*", "head"]], ids=str)
@pytest.mark.parametrize("preconditioner", [None, "rmsprop"])
def test_restored_after_success(
    build: Build, problem: Any, mixed: Mixed, sgld: Any, preconditioner: str | None, patterns: list[str] | None
) -> None:
    """Also when a pattern samples frozen parameters and leaves out trainable ones."""
    before = Snapshot(mixed)
    kernel = build(mixed, problem.data, sampler=sgld(preconditioner=preconditioner, params=patterns))
    before.assert_untouched()
    assert np.isfinite(kernel.to_numpy()).all()
    assert not np.asarray(kernel.dead).any()


@pytest.mark.parametrize("at", [1, 2, 9, 40])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_restored_after_an_exception(
    build: Build, problem: Any, mixed: Mixed, fail_at: Any, at: int, error: type[BaseException]
) -> None:
    """In the very first loss, soon after, in the first chain and in the second."""
    before = Snapshot(mixed)
    with pytest.raises(error, match="stopped by the test"):
        build(mixed, problem.data, loss=fail_at(at, error))
    before.assert_untouched()


def test_restored_after_an_exception_in_sample_losses(problem: Any, mixed: Mixed, fail_at: Any, sgld: Any) -> None:
    before = Snapshot(mixed)
    with pytest.raises(RuntimeError, match="stopped by the test"):
        lossk.sample_losses(mixed, problem.data, loss=fail_at(20), sampler=sgld(), num_draws=9, progress=False)
    before.assert_untouched()


@pytest.mark.parametrize(
    "bad", [{"tile": 100}, {"num_draws": 1}, {"backend": "abacus"}, {"loss": "hinge"}, {"device": "abacus"}], ids=str
)
def test_restored_after_a_bad_argument(build: Build, problem: Any, mixed: Mixed, bad: dict[str, Any]) -> None:
    before = Snapshot(mixed)
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        build(mixed, problem.data, **bad)
    before.assert_untouched()


def test_restored_after_bad_data(build: Build, problem: Any, mixed: Mixed) -> None:
    before = Snapshot(mixed)
    with pytest.raises(ValueError, match="17"):
        build(mixed, (problem.inputs, torch.where(problem.targets == 2, 17, problem.targets)))
    before.assert_untouched()


@pytest.mark.parametrize("n_steps", [1e6, 1e30])
def test_restored_after_divergence(build: Build, problem: Any, mixed: Mixed, sgld: Any, n_steps: float) -> None:
    before = Snapshot(mixed)
    with pytest.raises(lossk.DivergedError):
        build(mixed, problem.data, sampler=sgld(lr=n_steps, num_burnin_steps=200))
    before.assert_untouched()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_come_back(build: Build, problem: Any, mixed: Mixed, dtype: torch.dtype) -> None:
    """Inputs in the model's own precision, as its owner would feed it."""
    for parameter in mixed.parameters():
        parameter.grad = None
    model = mixed.to(dtype)
    before = Snapshot(model)
    kernel = build(model, (problem.inputs.to(dtype), problem.targets))
    before.assert_untouched()
    assert np.isfinite(kernel.to_numpy()).all()
    assert not np.asarray(kernel.dead).any()


def test_training_goes_on_afterwards(build: Build, problem: Any, mixed: Mixed) -> None:
    """An optimizer built before the call still moves the same parameters."""
    optimizer = torch.optim.SGD([p for p in mixed.parameters() if p.requires_grad], lr=0.1)
    build(mixed, problem.data)
    before = mixed.gain.detach().clone()
    optimizer.zero_grad()
    nn.functional.cross_entropy(mixed(problem.inputs), problem.targets).backward()
    optimizer.step()
    assert not torch.equal(mixed.gain.detach(), before)


def test_global_generators_are_untouched(build: Build, problem: Any, mixed: Mixed) -> None:
    state = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[index,union-attr]  # noqa: NPY002
    for data in (problem.data, TensorDataset(*problem.data), Pairs(*problem.data), Stream(*problem.data)):
        build(mixed, data)
        if isinstance(data, Dataset):
            build(mixed, DataLoader(data, batch_size=4))
    assert torch.equal(torch.get_rng_state(), state[0])
    np.testing.assert_array_equal(np.random.get_state()[1], state[1])  # type: ignore[index]  # noqa: NPY002
    assert random.getstate() == state[2]


# --- frozen semantics --------------------------------------------------------------------------------------------


def test_batch_norm_and_dropout_are_frozen(build: Build, problem: Any, mixed: Mixed, assert_same_kernel: Same) -> None:
    """The same kernel from a model in training mode and in evaluation mode; a sample's loss ignores its batch."""
    training = build(mixed, problem.data)
    evaluation = build(mixed.eval(), problem.data)
    assert_same_kernel(training, evaluation)
    alone = build(mixed, DataLoader(TensorDataset(*problem.data), batch_size=1))
    np.testing.assert_allclose(alone.mean_loss, training.mean_loss, rtol=1e-5)


def still(sgld: Any) -> dict[str, Any]:
    """A chain that cannot leave w*: steps far below half an ulp of any weight."""
    return {
        "sampler": sgld(lr=1e-30),
        "num_chains": 2,
        "num_draws": 3,
        "backend": "torch",
        "progress": False,
    }


def test_without_a_step_losses_are_the_models(problem: Any, mixed: Mixed, sgld: Any) -> None:
    kept = lossk.sample_losses(mixed, problem.data, **still(sgld))
    losses = np.asarray(kept.losses)
    np.testing.assert_array_equal(losses, np.broadcast_to(losses[0, 0], losses.shape))
    mixed.eval()
    with torch.no_grad():
        logits = mixed(problem.inputs).double()
    expected = nn.functional.cross_entropy(logits, problem.targets, reduction="none")
    np.testing.assert_allclose(losses[0, 0], expected, rtol=1e-5)


def test_half_precision_forward(build: Build, problem: Any, mixed: Mixed) -> None:
    """bf16 keeps 8 bits: losses within 2 %, the same samples vary most; weights and what comes back are untouched."""
    before = Snapshot(mixed)
    full, half = build(mixed, problem.data), build(mixed, problem.data, precision="bf16")
    before.assert_untouched()
    np.testing.assert_allclose(half.mean_loss, full.mean_loss, rtol=0.02)
    assert not np.array_equal(half.mean_loss, full.mean_loss)
    assert np.corrcoef(half.to_numpy().ravel(), full.to_numpy().ravel())[0, 1] > 0.95


class Watch:
    """A loss that records which parameters ever differ from their first values."""

    def __init__(self) -> None:
        self.first: dict[str, Tensor] = {}
        self.moved: set[str] = set()
        self.__name__ = self.__qualname__ = "Watch"

    def __call__(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        for name, p in model.named_parameters():
            if name not in self.first:
                self.first[name] = p.detach().clone()
            elif not torch.equal(p.detach(), self.first[name]):
                self.moved.add(name)
        assert not model.training
        inputs, targets = batch
        return nn.functional.cross_entropy(model(inputs), targets, reduction="none")


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (None, {"first.weight", "first.bias", "norm.weight", "norm.bias", "square.weight", "head", "gain"}),
        (["first.*"], {"first.weight", "first.bias"}),
        (["head", "*.bias"], {"head", "first.bias", "norm.bias", "frozen.bias"}),
        (["tied.weight"], {"square.weight"}),
        (["gain"], {"gain"}),
    ],
    ids=["all", "first", "head and biases", "tied", "gain"],  # a set has no order of its own
)
def test_which_parameters_move(
    build: Build, problem: Any, mixed: Mixed, sgld: Any, patterns: list[str] | None, expected: set[str]
) -> None:
    """Those that require grad; with patterns those that match, frozen or not, under any of a tied weight's names."""
    watch = Watch()
    build(mixed, problem.data, loss=watch, sampler=sgld(params=patterns))
    assert watch.moved == expected


# --- data --------------------------------------------------------------------------------------------------------


class Pairs(Dataset[tuple[Tensor, int]]):
    """Plain Python labels; counts its reads."""

    def __init__(self, inputs: Tensor, targets: Tensor, noise: float = 0.0) -> None:
        self.inputs, self.targets, self.noise = inputs, targets, noise
        self.reads: list[int] = []

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        self.reads.append(i)
        return self.inputs[i] + self.noise * torch.randn(4), int(self.targets[i])


class Stream(IterableDataset[tuple[Tensor, int]]):
    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets, self.passes = inputs, targets, 0

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        self.passes += 1
        yield from zip(self.inputs, self.targets.tolist(), strict=True)


@pytest.mark.parametrize(
    "form",
    ["numpy", "tensor dataset", "dataset", "loader", "one big batch", "iterable", "iterable loader", "workers"],
)
def test_every_kind_of_data(build: Build, problem: Any, form: str) -> None:
    """The same samples in the same order; only a forward pass in other batches may round differently."""
    inputs, targets = problem.data
    data: Any = {
        "numpy": lambda: (inputs.numpy(), targets.numpy()),
        "tensor dataset": lambda: TensorDataset(inputs, targets),
        "dataset": lambda: Pairs(inputs, targets),
        "loader": lambda: DataLoader(Pairs(inputs, targets), batch_size=8),
        "one big batch": lambda: DataLoader(TensorDataset(inputs, targets), batch_size=500),
        "iterable": lambda: Stream(inputs, targets),
        "iterable loader": lambda: DataLoader(Stream(inputs, targets), batch_size=8),
        "workers": lambda: DataLoader(TensorDataset(inputs, targets), batch_size=8, num_workers=1),
    }[form]()
    model = problem.model()
    reference, other = build(model, problem.data), build(model, data)
    assert other.num_samples == problem.num_samples
    np.testing.assert_allclose(other.mean_loss, reference.mean_loss, rtol=1e-5)
    np.testing.assert_allclose(other.variance, reference.variance, rtol=1e-2)


def test_a_shuffling_loader_is_read_in_dataset_order(build: Build, problem: Any, assert_same_kernel: Same) -> None:
    dataset = TensorDataset(*problem.data)
    plain = build(problem.model(), DataLoader(dataset, batch_size=8))
    with pytest.warns(UserWarning, match=r"(?i)shuffl.*order"):
        shuffled = build(problem.model(), DataLoader(dataset, batch_size=8, shuffle=True))
    assert_same_kernel(plain, shuffled)


def test_a_loader_that_drops_its_last_batch_loses_no_sample(build: Build, problem: Any) -> None:
    """N is the number of samples of the dataset, or the loss of some is announced; never silent."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kernel = build(problem.model(), DataLoader(TensorDataset(*problem.data), batch_size=8, drop_last=True))
    assert kernel.num_samples == problem.num_samples or any("drop" in str(w.message) for w in caught)


def test_an_iterable_is_read_once(build: Build, problem: Any) -> None:
    stream = Stream(*problem.data)
    build(problem.model(), DataLoader(stream, batch_size=8))
    assert stream.passes == 1


def test_random_augmentation_is_cached(problem: Any, sgld: Any) -> None:
    """Without weight noise the losses of every draw and chain are the same: each sample was read, once, and kept."""
    dataset = Pairs(*problem.data, noise=1.0)
    kept = lossk.sample_losses(problem.model(), DataLoader(dataset, batch_size=8), **still(sgld))
    losses = np.asarray(kept.losses)
    np.testing.assert_array_equal(losses, np.broadcast_to(losses[0, 0], losses.shape))
    assert sorted(dataset.reads) == list(range(problem.num_samples))


def test_train_defines_the_gradient(build: Build, problem: Any) -> None:
    """The same probe under other training data is another kernel; under the loader's own it is the default one."""
    default = build(problem.model(), problem.data)
    explicit = build(problem.model(), problem.data, train=problem.data)
    np.testing.assert_array_equal(default.to_numpy(), explicit.to_numpy())
    other = build(problem.model(), problem.data, train=(problem.inputs.flip(0), problem.targets))
    assert other.num_samples == problem.num_samples
    assert not np.allclose(other.to_numpy(), default.to_numpy(), rtol=1e-2)


def test_inputs_are_not_changed(build: Build, problem: Any) -> None:
    inputs, targets = problem.inputs.clone(), problem.targets.clone()
    build(problem.model(), problem.data)
    assert torch.equal(problem.inputs, inputs)
    assert torch.equal(problem.targets, targets)
