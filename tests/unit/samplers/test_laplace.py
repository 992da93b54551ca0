"""The Laplace probe: its Fisher matrix against exact ones, its draws against their covariance, its layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lossk
import oracles
from lossk.curvature.fisher import FisherSamples, _recording, fisher_diagonal, kronecker_factors, kronecker_layers
from lossk.data.reading import read_samples
from lossk.samplers.chain import Surroundings
from lossk.samplers.laplace import LaplaceChain, fit_laplace
from lossk.task.losses import resolve_loss
from lossk.task.task import Task
from lossk.timings import Timings

N = 2000  # at most 2,048: all of them are used


def prepared(model: nn.Module, data: tuple[Tensor, Tensor], loss: Any, **changes: Any) -> tuple[Task, Any]:
    task = Task(model, resolve_loss(loss), **changes)
    task.__enter__()
    return task, task.place(read_samples(data, "train"))


def inputs(d: int) -> Tensor:
    """Correlated inputs."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, d, generator=generator) @ torch.randn(d, d, generator=generator)


def test_gaussian_likelihood_is_a_product() -> None:
    """A linear layer under "mse": C = E[a a'] x (2/k) I exactly; the outputs' factor has Monte Carlo error only."""
    x, k = inputs(4), 3
    model = nn.Linear(4, k)
    task, train = prepared(model, (x, torch.randn(N, k)), "mse")
    samples = FisherSamples(task, train, seed=0)
    layers = kronecker_layers(task, samples)
    (of_inputs, of_outputs), *rest = kronecker_factors(layers, samples)
    assert rest == []
    a = np.column_stack([x.double().numpy(), np.ones(N)])
    np.testing.assert_allclose(of_inputs.numpy(), a.T @ a / N, rtol=1e-5, atol=1e-5)
    error = 2 / k * np.sqrt((1 + np.eye(k)) / N)
    z = (of_outputs.numpy() - 2 / k * np.eye(k)) / error
    assert np.abs(z).max() < 4
    assert np.sqrt(np.mean(z[np.triu_indices(k)] ** 2)) < 2


def test_positions_add_up() -> None:
    """A layer over T independent positions under "mse": C = sum_t E[a_t a_t'] x (2/k) I, k = T o, is a product."""
    positions, out = 4, 2
    x = inputs(3 * positions).view(N, positions, 3)
    task, train = prepared(nn.Linear(3, out, bias=False), (x, torch.zeros(N, positions, out)), "mse")
    samples = FisherSamples(task, train, seed=0)
    ((of_inputs, of_outputs),) = kronecker_factors(kronecker_layers(task, samples), samples)
    a = x.double().numpy().reshape(-1, 3)
    np.testing.assert_allclose(of_inputs.numpy(), a.T @ a / len(a), rtol=1e-5, atol=1e-5)
    error = 2 / out * np.sqrt((1 + np.eye(out)) / len(a))
    assert np.abs((of_outputs.numpy() - 2 / out * np.eye(out)) / error).max() < 4


def softmax_fisher(p: np.ndarray) -> np.ndarray:
    """[N, C, C]: diag(p) - p p'."""
    return np.einsum("nc,cd->ncd", p, np.eye(p.shape[1])) - p[:, :, None] * p[:, None, :]


@pytest.mark.parametrize("structure", ["kronecker", "diagonal"])
def test_softmax_regression(structure: str) -> None:
    """Factors and diagonal against the exact Fisher in float64, |z| < 4.5 by the exact variance over the labels."""
    x, classes = inputs(4) / 3, 3
    model = nn.Linear(4, classes, bias=False)
    task, train = prepared(model, (x, torch.randint(0, classes, (N,))), "cross_entropy")
    samples = FisherSamples(task, train, seed=0)
    a = x.double().numpy()
    p = (x.double() @ task.anchor.double().view(classes, 4).T).softmax(dim=1).numpy()
    gradients = p[:, None, :] - np.eye(classes)  # [N, label, output]
    products = gradients[:, :, :, None] * gradients[:, :, None, :]  # [N, label, C, C]
    mean = np.einsum("nl,nlcd->ncd", p, products)
    np.testing.assert_allclose(mean, softmax_fisher(p), atol=1e-12)
    variance = np.einsum("nl,nlcd->ncd", p, products**2) - mean**2
    if structure == "kronecker":
        ((of_inputs, found),) = kronecker_factors(kronecker_layers(task, samples), samples)
        np.testing.assert_allclose(of_inputs.numpy(), a.T @ a / N, rtol=1e-5, atol=1e-6)
        truth, error = mean.mean(axis=0), np.sqrt(variance.mean(axis=0) / N)
    else:
        (found,) = fisher_diagonal([0], samples)
        diagonal, spread = (np.einsum("ncc->nc", m) for m in (mean, variance))
        truth = diagonal.T @ a**2 / N
        error = np.sqrt(spread.T @ a**4) / N
    z = (found.numpy() - truth) / error
    assert np.abs(z).max() < 4.5
    assert np.sqrt(np.mean(z**2)) < 2


def half_square(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return 0.5 * (model(batch[0]).squeeze(1) - batch[1]).square()


def test_a_loss_of_ones_own_takes_the_datas_labels() -> None:
    """The empirical Fisher: mean of r^2 x x', its diagonal, without any randomness."""
    x, y = inputs(3), torch.randn(N)
    model = nn.Linear(3, 1, bias=False)
    task, train = prepared(model, (x, y), half_square)
    (found,) = fisher_diagonal([0], FisherSamples(task, train, seed=0))
    r = (x.double() @ task.anchor.double() - y.double())[:, None]
    np.testing.assert_allclose(found.numpy()[0], (r * x.double()).square().mean(dim=0).numpy(), rtol=1e-5)


class Net(nn.Module):
    """Convolutions of many kinds, an in-place activation, a norm, a layer over positions, a tied and a repeated one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 3, (2, 3), stride=(1, 2), padding=1, bias=True)
        self.second = nn.Conv2d(3, 2, 3, padding="same", dilation=2, padding_mode="circular", bias=False)
        self.grouped = nn.Conv2d(2, 2, 1, groups=2)
        self.norm = nn.GroupNorm(1, 2)
        self.positions = nn.Linear(4, 3)
        self.twice = nn.Linear(3, 3)
        self.tied, self.again = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.again.weight = self.tied.weight
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.second(torch.tanh(self.first(x))))
        x = self.positions(self.norm(self.grouped(x)).flatten(2)[:, :, :4])
        x = self.twice(torch.tanh(self.twice(x)))
        return self.head(self.again(torch.tanh(self.tied(x))).mean(dim=1))


def net_and_data(n: int = 12) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(2)
    return Net(), (torch.randn(n, 2, 6, 7), torch.arange(n) % 3)


def test_which_layers_have_factors() -> None:
    model, data = net_and_data()
    task, train = prepared(model, data, "cross_entropy")
    layers = kronecker_layers(task, FisherSamples(task, train, seed=0))
    assert [layer.name for layer in layers] == ["first", "second", "positions", "head"]
    assert [layer.bias is None for layer in layers] == [False, True, False, False]


def test_rows_times_gradients_are_the_gradient() -> None:
    """The sum over positions of g a' is autograd's gradient of [weight, bias]; strides, padding, dilation."""
    model, data = net_and_data()
    task, train = prepared(model, data, "cross_entropy")
    samples = FisherSamples(task, train, seed=0)
    layers = kronecker_layers(task, samples)
    with _recording(layers):
        total = samples.losses(0, len(samples)).sum()
        places = [i for layer in layers for i in layer.members]
        outputs = torch.autograd.grad(total, [layer.outputs[0] for layer in layers], retain_graph=True)
        exact = dict(zip(places, torch.autograd.grad(total, [task.sampled[i] for i in places]), strict=True))
        for layer, output in zip(layers, outputs, strict=True):
            wanted = [exact[i].reshape(layer.matrix()[0], -1) for i in layer.members]
            found = layer.output_rows(output).T @ layer.rows()[0]
            torch.testing.assert_close(found, torch.cat(wanted, dim=1), rtol=1e-4, atol=1e-6)


def exact_covariance(task: Task, train: Any, n_beta: float, gamma: float, structure: str) -> np.ndarray:
    """[P, P] in the order of `task.flat`: dense inverses of n_beta C + gamma, in float64."""
    samples = FisherSamples(task, train, seed=7)
    layers = kronecker_layers(task, samples) if structure == "kronecker" else []
    place = torch.arange(task.num_weights)
    where, start = [], 0  # of each parameter: the places in `flat` of its elements, in its own shape
    for p in task.sampled:
        where.append(task._view(place[start : start + p.numel()], p.shape))
        start += p.numel()
    out = np.zeros((task.num_weights, task.num_weights))
    for layer, (a, g) in zip(layers, kronecker_factors(layers, samples), strict=True):
        index = torch.cat([where[i].reshape(layer.matrix()[0], -1) for i in layer.members], dim=1).reshape(-1).numpy()
        dense = n_beta * np.kron(g.numpy(), a.numpy()) + gamma * np.eye(len(index))
        out[np.ix_(index, index)] = np.linalg.inv(dense)
    covered = {i for layer in layers for i in layer.members}
    rest = [i for i in range(len(task.sampled)) if i not in covered]
    for i, fisher in zip(rest, fisher_diagonal(rest, samples), strict=True):
        index = where[i].reshape(-1).numpy()
        out[index, index] = 1 / (n_beta * fisher.numpy().reshape(-1) + gamma)
    return out


@pytest.mark.parametrize("structure", ["kronecker", "diagonal"])
def test_draws_have_their_covariance(structure: Any) -> None:
    """4,000 draws of all weights of a network: mean 0 and covariance (n_beta C + gamma)^-1; 20 % more is refused."""
    model, data = net_and_data()
    task, train = prepared(model, data, "cross_entropy")
    sampler = lossk.Laplace(n_beta=2e5, localization=2.0, structure=structure)
    fitted = fit_laplace(sampler, task, train, 7)
    around = Surroundings(task, train, torch.zeros(1), 3, "torch", Timings(), fitted)
    moves = []
    for _ in LaplaceChain(around, sampler, 0).run(4000):
        moves.append(task.flat - task.anchor)
    found = torch.stack(moves).double().numpy()
    task.reset()
    truth = exact_covariance(task, train, 2e5, 2.0, structure)

    def z(truth: np.ndarray) -> np.ndarray:
        scale = np.sqrt((np.outer(np.diag(truth), np.diag(truth)) + truth**2) / len(found))
        return ((found.T @ found / len(found) - truth) / scale)[np.triu_indices(len(truth))]

    assert np.abs(z(truth)).max() < 5.5  # of some 10^4 entries
    assert 0.9 < np.sqrt(np.mean(z(truth) ** 2)) < 1.1
    assert np.abs(z(1.2 * truth)).max() > 5.5
    assert np.abs(found.mean(axis=0) / np.sqrt(np.diag(truth) / len(found))).max() < 4.5


def test_kernel_of_linear_regression() -> None:
    """K of the probe is T1's with S = A^-1 up to the 3 % of the Fisher's own noise; the diagonal's is not."""
    x, n_beta, gamma = inputs(3), 100.0, 5.0
    model = nn.Linear(3, 1, bias=False)
    weight = model.weight.detach().double().numpy()[0]
    y = x.double().numpy() @ weight + 0.3 * np.random.default_rng(0).standard_normal(N)
    data = (x, torch.tensor(y).float())
    wide = x.double().numpy()[:20]
    a = oracles.posterior_precision(x.double().numpy(), 2 * n_beta, gamma)
    truth = 4 * oracles.regression_covariance(wide, y[:20] - wide @ weight, np.linalg.inv(a))
    error = {}
    for structure in ("kronecker", "diagonal"):
        traces = lossk.sample_losses(
            model, tuple(t[:20] for t in data), train=data, loss="mse", num_chains=2, num_draws=2000, progress=False,
            sampler=lossk.Laplace(n_beta=n_beta, localization=gamma, structure=structure),  # type: ignore[arg-type]
        )  # fmt: skip
        k = lossk.LossKernel.from_traces(traces).to_numpy()
        error[structure] = np.linalg.norm(k - truth) / np.linalg.norm(truth)
    assert error["kronecker"] < 0.12, error
    assert error["diagonal"] > 0.3, error


def test_restored_and_resumed_bitwise(resumed_is_whole: Any) -> None:
    assert resumed_is_whole(lossk.Laplace(localization=3.0), 2).diagnostics.llc is None


def test_automatic_localization_and_params(problem: Any, build: Any) -> None:
    kernel = build(problem.model(), problem.data, sampler=lossk.Laplace(params=["2.*"]), num_draws=30)
    assert kernel.meta["sampler"]["localization"] > 0
    assert kernel.meta["sampler"]["n_beta"] == pytest.approx(21 / np.log(21))
    assert kernel.meta["config"]["num_weights"] == 18
    assert len(kernel.meta["reasons"]) == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [("n_beta", 0.0), ("localization", 0.0), ("localization", "no"), ("structure", "full"), ("params", "weight")],
)
def test_bad_settings(field: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=field):
        lossk.Laplace(**{field: value})
