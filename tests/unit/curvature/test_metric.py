"""The Fisher metric: its law in closed form, what it does not depend on, and all that reads weights out of a chain."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lossk
import oracles
from lossk.curvature.curvature import Products
from lossk.curvature.metric import fisher_scales
from lossk.data.reading import read_samples
from lossk.samplers.metropolis import Energy
from lossk.task.losses import resolve_loss
from lossk.task.task import Task

Build = Callable[..., lossk.LossKernel]
Same = Callable[[lossk.LossKernel, lossk.LossKernel], None]
Array = np.ndarray


class TwoTensors(nn.Module):
    """x'(a, b) with a [2] and b [3] tensors of their own."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(weights[:2].clone()), nn.Parameter(weights[2:].clone())

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.cat([self.a, self.b])


def half_square(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return 0.5 * (model(batch[0]) - batch[1]).square()


def regression() -> tuple[nn.Module, Tensor, Tensor]:
    """30 samples whose last three inputs are ten times as large, at the least-squares solution."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(30, 5, generator=generator) * torch.tensor([1.0, 1.0, 10.0, 10.0, 10.0])
    y = x @ torch.tensor([1.0, -0.5, 0.03, 0.02, -0.1]) + torch.randn(30, generator=generator)
    return TwoTensors(torch.linalg.lstsq(x, y[:, None]).solution[:, 0]), x, y


def wide_relu(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))


def rescaled(model: nn.Sequential, c: float) -> nn.Sequential:
    """The same function: the first layer times c, the second divided by c."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        model[0].weight *= c
        model[0].bias *= c
        model[2].weight /= c
    return model


# --- the law -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampler", "num_draws"),
    [
        (lossk.HMC(step_size=0.12, localization=40.0, metric="fisher", n_beta=12.0, num_leapfrog_steps=2), 900),
        (lossk.SGLD(localization=40.0, metric="fisher", n_beta=12.0, batch_size=None), 700),
        (lossk.BAOAB(localization=40.0, metric="fisher", n_beta=12.0, batch_size=None), 700),
    ],
)
def test_the_law_in_closed_form(sampler: Any, num_draws: int) -> None:
    """T1 with S = (n_beta H + 40 diag(F))^-1, F the mean squared gradient of a tensor's elements."""
    model, x, y = regression()
    kernel = lossk.build_kernel(
        model, (x, y), loss=half_square, sampler=sampler, num_chains=4, num_draws=num_draws, progress=False
    )
    inputs, w = x.double().numpy(), torch.cat([model.a, model.b]).detach().double().numpy()
    residual = inputs @ w - y.double().numpy()
    squares = ((residual[:, None] * inputs) ** 2).mean(axis=0)
    fisher = np.repeat([squares[:2].mean(), squares[2:].mean()], [2, 3])
    np.testing.assert_allclose(list(kernel.meta["scales"].values()), fisher[[0, 2]] ** -0.5, rtol=1e-5)
    spread = np.linalg.inv(12.0 / 30 * inputs.T @ inputs + 40 * np.diag(fisher))
    expected = oracles.regression_covariance(inputs, residual, spread)
    found = kernel.to_numpy().astype(np.float64)
    assert abs(np.trace(found) / np.trace(expected) - 1) < 0.06
    assert np.linalg.norm(found - expected) < 0.1 * np.linalg.norm(expected)
    isotropic = np.linalg.inv(12.0 / 30 * inputs.T @ inputs + 40 * np.eye(5))
    other = oracles.regression_covariance(inputs, residual, isotropic)
    assert np.linalg.norm(found - other) > 0.3 * np.linalg.norm(expected)  # the isotropic law is another
    assert kernel.diagnostics is not None
    distance = kernel.diagnostics.distance
    assert distance is not None
    assert 0.7 < distance / np.sqrt(np.trace(spread)) < 1.0  # in the model's own weights


@pytest.mark.parametrize("c", [0.125, 1024.0])
@pytest.mark.parametrize(
    "sampler", [lossk.SGLD(localization="fisher"), lossk.BAOAB(localization="fisher")], ids=["sgld", "baoab"]
)
def test_layers_of_another_scale_have_the_same_kernel_to_the_bit(
    build: Build, problem: Any, assert_same_kernel: Same, c: float, sampler: Any
) -> None:
    """Powers of two round nothing."""
    model, data = wide_relu(), problem.data
    first, second = (build(net, data, sampler=sampler) for net in (model, rescaled(model, c)))
    assert_same_kernel(first, second)
    assert first.meta["sampler"] == second.meta["sampler"]
    assert second.meta["scales"]["0.weight"] == c * first.meta["scales"]["0.weight"]


def test_layers_of_another_scale_change_the_isotropic_law(build: Build, problem: Any) -> None:
    model = wide_relu()
    first, second = (build(net, problem.data, sampler=lossk.SGLD()).to_numpy() for net in (model, rescaled(model, 8.0)))
    assert not np.allclose(first, second, rtol=0.2)


def test_the_scales_do_not_depend_on_the_run(build: Build, problem: Any, sgld: Callable[..., lossk.SGLD]) -> None:
    sampler = sgld(metric="fisher")
    for name in ("cross_entropy", "mse"):
        targets = problem.targets if name == "cross_entropy" else nn.functional.one_hot(problem.targets, 3).float()
        runs = [
            build(problem.model(), (problem.inputs, targets), loss=name, sampler=sampler, seed=seed).meta["scales"]
            for seed in (0, 5)
        ]
        assert runs[0] == runs[1]
        assert min(runs[0].values()) > 0


def test_dead_tensors_do_not_wander_off(build: Build, problem: Any) -> None:
    """A layer behind dead units has no gradient: its scale is bounded by its own size; one of zeros stays."""
    torch.manual_seed(1)

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.alive, self.dead, self.zeros = nn.Linear(4, 3), nn.Linear(4, 3), nn.Parameter(torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.alive(x) + (self.dead(x) + self.zeros - 1e3).relu()

    model = Branches()
    kernel = build(model, problem.data, sampler=lossk.SGLD(localization="fisher"), num_draws=20)
    scales = kernel.meta["scales"]
    assert scales["zeros"] == 0.0
    squares = {name: float(tensor.square().mean()) for name, tensor in model.state_dict().items()}
    largest = max(scales[name] ** -2 * squares[name] for name in ("alive.weight", "alive.bias"))
    assert scales["dead.weight"] == pytest.approx((1e-6 * largest / squares["dead.weight"]) ** -0.5, rel=1e-4)
    assert np.isfinite(kernel.to_numpy()).all()


# --- every reader of the coordinates -----------------------------------------------------------------------------


@pytest.fixture
def moved(problem: Any) -> Any:
    """(task, samples) in a metric, away from w*."""
    model = wide_relu()
    task = Task(model, resolve_loss("cross_entropy"))
    samples = read_samples(problem.data)
    with task:
        scales = fisher_scales(task, samples)
        before = task.losses(samples[torch.arange(len(samples))])
        task.rescale(list(scales.values()))
        assert torch.equal(task.losses(samples[torch.arange(len(samples))]), before)  # w* itself
        assert torch.equal(task.weights(), torch.cat([p.detach().flatten() for p in task.sampled]))
        spread = torch.cat([torch.full((p.numel(),), s) for p, s in zip(task.sampled, scales.values(), strict=True)])
        task.flat += 0.01 * torch.randn(task.num_weights, generator=torch.Generator().manual_seed(0))
        yield task, samples, spread


def autograd_at(task: Task, samples: Any, spread: Tensor) -> Callable[[Tensor], Tensor]:
    """The mean loss as a function of u, in float64, by a network of its own."""
    network, shapes = wide_relu().double(), [p.shape for p in task.sampled]
    inputs, targets = samples[torch.arange(len(samples))]
    anchor, trained = task.anchor.double(), torch.cat([p.detach().flatten() for p in network.parameters()])

    def mean(u: Tensor) -> Tensor:
        w = trained + spread.double() * (u - anchor)
        parts = [part.view(shape) for part, shape in zip(w.split([s.numel() for s in shapes]), shapes, strict=True)]
        out = torch.func.functional_call(network, dict(zip(task.names, parts, strict=True)), inputs.double())
        return nn.functional.cross_entropy(out, targets)

    return mean


def test_gradients_losses_and_curvature_are_those_of_the_coordinates(moved: Any) -> None:
    task, samples, spread = moved
    mean, u = autograd_at(task, samples, spread), task.flat.double()
    gradient, every = torch.func.grad(mean)(u), torch.arange(len(samples))
    task.passes = lossk.Passes(gradient_batch=5)  # several passes are added up
    value = task.gradient(samples, every)
    assert value == pytest.approx(float(mean(u)), rel=1e-5)
    torch.testing.assert_close(task.grad.double(), gradient, rtol=1e-4, atol=1e-5)
    out = torch.empty_like(task.flat)
    Energy(task, samples, n_beta=2.0, localization=0.5).gradient(out)
    torch.testing.assert_close(out.double(), 2 * gradient + 0.5 * (u - task.anchor.double()), rtol=1e-4, atol=1e-5)
    direction = torch.randn(task.num_weights, generator=torch.Generator().manual_seed(1))
    direction /= direction.norm()
    along = torch.func.grad(lambda at: torch.func.grad(mean)(at) @ direction.double())(u)
    found = Products(task, samples, every).hessian(direction).double()
    assert float((found - along).norm()) < 0.02 * float(along.norm())


class Shared(nn.Module):
    """Autograd gives `a` and `b` one gradient in the same memory, and `c` one number in the memory of four."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.ones(count)) for count in (3, 3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ (self.a + self.b) + self.c.sum())[:, None]


@pytest.mark.parametrize("batch", [3, 10])
def test_gradients_that_share_memory_are_scaled_once(batch: int) -> None:
    generator = torch.Generator().manual_seed(2)
    samples = read_samples((torch.randn(10, 3, generator=generator), torch.randn(10, 1, generator=generator)))
    task, every = Task(Shared(), resolve_loss("mse")), torch.arange(10)
    task.passes = lossk.Passes(gradient_batch=batch)
    with task:
        task.gradient(samples, every)
        plain = task.grad.clone()
        task.rescale([2.0, 3.0, 5.0])
        task.gradient(samples, every)
        expected = plain * torch.tensor([2.0] * 3 + [3.0] * 3 + [5.0] * 4)
        torch.testing.assert_close(task.grad, expected, rtol=1e-5, atol=1e-6)


def test_distance_is_that_of_the_weights(moved: Any) -> None:
    task, _, spread = moved
    expected = float((spread.double() * (task.flat - task.anchor).double()).norm())
    assert task.distance() == pytest.approx(expected, rel=1e-4)
    task.reset()
    assert task.distance() == 0.0


@pytest.mark.parametrize(
    "passes",
    [
        lossk.Passes(overlap=True, probe_batch=8),
        lossk.Passes(fused_head=True),
        lossk.Passes(memory_format="channels_last"),
    ],
    ids=["overlap", "fused head", "channels last"],
)
@pytest.mark.parametrize("params", [None, ["4.*"]], ids=["all", "head"])
def test_ways_of_running_the_model_give_one_kernel(
    build: Build, problem: Any, passes: lossk.Passes, params: list[str] | None
) -> None:
    """Copies of draws, and stacks of heads, hold the model's weights."""
    sampler = lossk.SGLD(
        lr=1e-3, n_beta=30.0, localization=50.0, metric="fisher", num_burnin_steps=3, num_steps_bw_draws=2,
        params=params, batch_size=4,
    )  # fmt: skip
    model = wide_relu()
    plain = build(model, problem.data, sampler=sampler, passes=lossk.Passes(fused_head=False)).to_numpy()
    other = build(model, problem.data, sampler=sampler, passes=passes).to_numpy()
    np.testing.assert_allclose(other, plain, rtol=1e-3, atol=1e-5 * np.abs(plain).max())
    assert np.abs(plain).max() > 0


@pytest.mark.parametrize("fraction", [0.75, 0.9])
def test_resuming_is_bitwise_and_measures_nothing_again(
    build: Build, problem: Any, fail_at: Any, assert_same_kernel: Same, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, fraction: float,
) -> None:  # fmt: skip
    loss, asked = fail_at(), {"sampler": lossk.SGLD(localization="fisher"), "num_draws": 40}
    whole = build(problem.model(), problem.data, loss=loss, **asked)
    loss.at, loss.calls = int(fraction * loss.calls), 0
    with pytest.raises(RuntimeError, match="stopped by the test"):
        build(problem.model(), problem.data, loss=loss, out=tmp_path / "k", **asked)
    loss.at = None
    monkeypatch.setattr("lossk.curvature.metric.fisher_scales", lambda *_: pytest.fail("measured again"))
    resumed = build(problem.model(), problem.data, loss=loss, out=tmp_path / "k", resume=True, **asked)
    assert_same_kernel(resumed, whole)
    assert lossk.open(tmp_path / "k").meta["scales"] == whole.meta["scales"]


@pytest.mark.parametrize("diverges", [False, True])
def test_the_model_comes_back_bit_for_bit(build: Build, problem: Any, diverges: bool) -> None:
    model = problem.model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sampler = lossk.SGLD(localization="fisher", **({"lr": 1e6} if diverges else {}))
    if diverges:
        with pytest.raises(lossk.DivergedError):
            build(model, problem.data, sampler=sampler, num_draws=50)
    else:
        build(model, problem.data, sampler=sampler)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not any(p.grad is not None for p in model.parameters())


# --- the settings ------------------------------------------------------------------------------------------------


def test_without_a_metric_nothing_is_made(problem: Any, build: Build) -> None:
    """The model reads `flat` itself, and records do not know of scales."""
    with Task(problem.model(), resolve_loss("cross_entropy")) as task:
        assert task.weights() is task.flat
        assert task.sampled[0].data_ptr() == task.flat.data_ptr()
        assert task.pull_back(task.grad) is task.grad
    kernel = build(problem.model(), problem.data)
    assert "metric" not in kernel.meta["sampler"]
    assert "scales" not in kernel.meta


def test_settings() -> None:
    short = lossk.SGLD(localization="fisher")
    assert short == lossk.SGLD(localization="auto", metric="fisher")
    assert lossk.SGLD(**short.to_dict()) == short
    assert lossk.SGLD(localization=2.0, metric="fisher").localization == 2.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lossk.SGLD(localization="ficher"), "localization must be a number, 'auto' or 'fisher', got 'ficher'"),
        (lambda: lossk.SGLD(metric="hessian"), "metric must be"),
        (lambda: lossk.BAOAB(metric=1), "metric must be"),
        (lambda: lossk.HMC(step_size=0.1, localization=1.0, metric="x"), "metric must be"),
        (lambda: lossk.Laplace(localization="fisher"), "localization must be"),
    ],
)
def test_refused_by_name(make: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_without_gradients_it_is_refused(build: Build, problem: Any) -> None:
    """All weights zero: the hidden layer has no gradient, and the output layer no inputs."""
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.ReLU(), nn.Linear(3, 3, bias=False))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    with pytest.raises(ValueError, match="localization='fisher' needs gradients at the trained weights"):
        build(model, problem.data, sampler=lossk.SGLD(localization="fisher"))
