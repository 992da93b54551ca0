"""`cross_kernel`: blocks of the full kernel, known laws, and what retraining without a sample does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bench.oracles_logistic import logistic_problem
from scipy import optimize
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lossk
import oracles
from lossk.analysis.influence_functions import damped_influence

Build = Callable[..., lossk.LossKernel]
Data = tuple[Tensor, Tensor]

SMALL: dict[str, Any] = {"num_chains": 2, "num_draws": 6, "backend": "torch", "progress": False}


def halves(problem: Any) -> tuple[Data, Data]:
    inputs, targets = problem.data
    return (inputs[:13], targets[:13]), (inputs[13:], targets[13:])


# --- the same numbers --------------------------------------------------------------------------------------------


def test_it_is_the_block_of_the_full_kernel(build: Build, problem: Any, sgld: Any) -> None:
    train, query = halves(problem)
    full = build(problem.model(), lossk.ProbeSets(train=train, query=query), train=train)
    cross = lossk.cross_kernel(problem.model(), train, query, sampler=sgld(), **SMALL)
    rows, columns = full.sets["train"], full.sets["query"]
    assert cross.shape == (13, 8)
    scale = float(full.variance.max())
    np.testing.assert_allclose(cross[:], full[rows, columns], rtol=1e-4, atol=1e-6 * scale)
    np.testing.assert_allclose(cross.correlation(), full.correlation(rows, columns), atol=1e-5)
    for correlation in (False, True):
        np.testing.assert_allclose(
            cross.standard_error(correlation=correlation, method="lag1"),
            full.standard_error(rows, columns, correlation=correlation, method="lag1"),
            rtol=1e-3,
        )
    np.testing.assert_allclose(cross.train_mean_loss, full.mean_loss[rows], rtol=1e-6)
    np.testing.assert_allclose(cross.query_mean_loss, full.mean_loss[columns], rtol=1e-6)
    np.testing.assert_allclose(cross.train_variance, full.variance[rows], rtol=1e-6)
    np.testing.assert_allclose(cross.query_variance, full.variance[columns], rtol=1e-6)
    assert torch.equal(cross.influence(), -cross[:]), "the influence is minus the kernel, and only it is"
    assert torch.equal(cross[[2, 5], 1:4], cross[:][[2, 5]][:, 1:4])
    assert torch.equal(cross.influence([2], [3]), -cross[[2], [3]])
    assert cross.standard_error([1], method="chains").shape == (1, 8)
    assert cross.kernel.form == "factor"
    assert cross.meta["config"]["num_train"] == 13
    assert cross.diagnostics is not None
    assert "13 x 8" in repr(cross)


def test_some_rows_see_the_same_training_loss(problem: Any, sgld: Any) -> None:
    """Which rows are asked for does not change the chain: L_n is over all training samples."""
    train, query = halves(problem)
    whole = lossk.cross_kernel(problem.model(), train, query, sampler=sgld(), **SMALL)
    some = lossk.cross_kernel(problem.model(), train, query, rows=[9, -11], sampler=sgld(), **SMALL)
    assert some.train_samples.tolist() == [9, 2]
    assert whole.train_samples.tolist() == list(range(13))
    assert some.query_samples.tolist() == list(range(8))
    np.testing.assert_allclose(some[:], whole[[9, 2]], rtol=1e-3, atol=1e-5 * float(whole.train_variance.max()))
    mask = torch.arange(13) < 4
    loader = DataLoader(TensorDataset(*train), batch_size=5)
    masked = lossk.cross_kernel(problem.model(), loader, query, rows=mask, sampler=sgld(), **SMALL)
    np.testing.assert_allclose(masked[:], whole[:4], rtol=1e-3, atol=1e-5 * float(whole.train_variance.max()))


def test_of_any_kernel(build: Build, problem: Any, tmp_path: Path) -> None:
    """From a store, by names of sets or by rows."""
    train, query = halves(problem)
    path = tmp_path / "k.lossk"
    kernel = build(problem.model(), lossk.ProbeSets(query=query, train=train), train=train, out=path)
    cross = lossk.CrossKernel(lossk.open(path))
    assert torch.equal(cross[:], kernel[kernel.sets["train"], kernel.sets["query"]])
    assert cross.train_samples.tolist() == list(range(13))
    by_row = lossk.CrossKernel(kernel, [20, 8], slice(0, 3))
    assert torch.equal(by_row[:], kernel[[20, 8], slice(0, 3)])
    assert by_row.train_samples.tolist() == [20, 8]
    with pytest.raises(ValueError, match=r"train must name a set of the kernel, got 'test'; its sets are query, train"):
        lossk.CrossKernel(kernel, "test", "query")
    alone = build(problem.model(), train)
    with pytest.raises(ValueError, match="built from a single probe"):
        lossk.CrossKernel(alone)
    with pytest.raises(ValueError, match="query must select at least one sample"):
        lossk.CrossKernel(alone, slice(None), [])
    with pytest.raises(IndexError, match="out of range"):
        lossk.CrossKernel(alone, [99], [0])


def test_noise_floor_is_of_as_many_samples_as_there_are_rows() -> None:
    """Of the same n training samples the floor is that of a kernel of n samples, whatever the number of queries."""
    losses = torch.randn(2, 50, 40)
    alone = lossk.LossKernel.from_traces(lossk.LossTraces(losses[..., :30]))
    both = lossk.LossKernel.from_traces(lossk.LossTraces(losses))
    cross = lossk.CrossKernel(both, slice(0, 30), slice(20, 30))
    np.testing.assert_allclose(cross.noise_floor, alone.neighbors(1).noise_floor[20:30], rtol=1e-6)


# --- known laws --------------------------------------------------------------------------------------------------


def square_loss(model: nn.Module, batch: Data) -> Tensor:
    return 0.5 * (model(batch[0]).squeeze(1) - batch[1]).square()


def test_linear_regression_t1() -> None:
    """K_ij = r_i r_j s_ij + 1/2 s_ij^2 with the chain's own covariance S (T1, T2), by z scores over 16 chains."""
    rng = np.random.default_rng(4)
    x, q = rng.standard_normal((20, 2)), rng.standard_normal((5, 2))
    y, y_query = x @ [1.0, -2.0] + rng.standard_normal(20), rng.standard_normal(5)
    n_beta, gamma = 40.0, 4.0
    w = np.linalg.lstsq(x, y, rcond=None)[0]
    a = oracles.posterior_precision(x, n_beta, gamma)
    lr = 0.8 / np.linalg.eigvalsh(a)[-1]
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(w).float()[None])
    cross = lossk.cross_kernel(
        model,
        (torch.from_numpy(x).float(), torch.from_numpy(y).float()),
        (torch.from_numpy(q).float(), torch.from_numpy(y_query).float()),
        loss=square_loss,
        sampler=lossk.SGLD(
            lr=lr, n_beta=n_beta, localization=gamma, batch_size=None, num_burnin_steps=20, num_steps_bw_draws=6
        ),
        num_chains=16,
        num_draws=40,
        progress=False,
    )
    residual = np.concatenate([y - x @ w, y_query - q @ w])
    truth = oracles.regression_covariance(np.concatenate([x, q]), residual, oracles.discretised_covariance(a, lr))
    z = (cross[:].double().numpy() - truth[:20, 20:]) / cross.standard_error(method="chains").double().numpy()
    assert oracles.consistent(z), z


def logistic_loss(model: Any, batch: Any) -> Tensor:
    return F.softplus(-(batch[0] @ model.weight.T).squeeze(1))


def test_influence_limit_t9() -> None:
    """n_beta K tends to g_i' (H + gamma / n_beta)^-1 g_j: at n_beta = 480 the exact law is 0.0086 away (math page).

    Of 2 x 300 nearly independent draws a covariance has a relative error of about sqrt(2 / 600) = 0.058, a matrix of
    rank 2 no more than about twice that; the bound is 0.0086 + 1.5 x 2 x 0.058.
    """
    yx, w, _, hessian = logistic_problem()
    n_beta, ratio = 480.0, 0.1
    a = n_beta * (np.linalg.eigvalsh(hessian)[-1] + ratio)
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(w).float()[None])
    data = torch.from_numpy(yx).float(), torch.zeros(len(yx))
    query = data[0][:5] * -0.5, torch.zeros(5)
    cross = lossk.cross_kernel(
        model, data, query, loss=logistic_loss, num_chains=2, num_draws=300, progress=False,
        sampler=lossk.BAOAB(step_size=0.8 * a**-0.5, friction=0.5 * a**0.5, n_beta=n_beta, batch_size=None,
                            localization=n_beta * ratio, num_burnin_steps=30, num_steps_bw_draws=6),
    )  # fmt: skip
    exact = damped_influence(
        model, lossk.ProbeSets(train=data, query=query), train=data, damping=ratio, curvature="hessian",
        loss=logistic_loss,
    )  # fmt: skip
    expected = exact[exact.sets["train"], exact.sets["query"]]
    assert float((n_beta * cross[:] - expected).norm() / expected.norm()) < 0.183


# --- what it is for: leaving a sample out ------------------------------------------------------------------------


def fit(x: np.ndarray, y: np.ndarray, start: np.ndarray) -> np.ndarray:
    """The optimum of a softmax regression's mean cross entropy; weights [3, d], the last row held at 0."""

    def value(flat: np.ndarray) -> tuple[float, np.ndarray]:
        w = torch.from_numpy(flat.reshape(2, -1)).requires_grad_()
        logits = torch.from_numpy(x) @ torch.cat([w, torch.zeros_like(w[:1])]).T
        loss = F.cross_entropy(logits, torch.from_numpy(y))
        (gradient,) = torch.autograd.grad(loss, w)
        return loss.item(), gradient.numpy().ravel()

    found = optimize.minimize(value, start.ravel(), jac=True, method="BFGS", options={"gtol": 1e-9})
    assert np.abs(found.jac).max() < 1e-6
    return found.x


class Softmax(nn.Module):
    """Softmax regression of 3 classes, identifiable: the last class's weights are 0."""

    def __init__(self, weight: np.ndarray) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.from_numpy(weight.reshape(2, -1)).float())

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.cat([self.weight, torch.zeros_like(self.weight[:1])]).T


def test_it_predicts_leave_one_out_retraining() -> None:
    """A convex model retrained to its optimum without each of 40 training samples: the rise of each of 25 query losses
    against (n_beta / n) K_ij, over all 1,000 pairs: correlation above 0.9, and a slope from 1 upward, as removing a
    sample of leverage h (6/40 on average, more for those that matter) does 1 / (1 - h) of what the first order says."""
    rng = np.random.default_rng(7)
    centers = rng.standard_normal((3, 3))
    y, y_query = np.arange(40) % 3, np.arange(25) % 3
    x = centers[y] + 1.2 * rng.standard_normal((40, 3))
    x_query = centers[y_query] + 1.2 * rng.standard_normal((25, 3))
    w = fit(x, y, np.zeros(6))

    def losses(flat: np.ndarray) -> np.ndarray:
        logits = x_query @ np.concatenate([flat.reshape(2, 3), np.zeros((1, 3))]).T
        return oracles.cross_entropy(logits, y_query)

    rise = np.stack([losses(fit(np.delete(x, i, 0), np.delete(y, i), w)) - losses(w) for i in range(40)])
    n_beta = 4000.0
    curvature = (
        n_beta / 2 * np.linalg.eigvalsh(x.T @ x / 40)[-1] + 1.0
    )  # at most: a softmax has p (1 - p) <= 1/2 in all
    model = Softmax(w)
    cross = lossk.cross_kernel(
        model,
        (torch.from_numpy(x).float(), torch.from_numpy(y)),
        (torch.from_numpy(x_query).float(), torch.from_numpy(y_query)),
        sampler=lossk.BAOAB(
            step_size=curvature**-0.5,
            friction=0.2 * curvature**0.5,
            n_beta=n_beta,
            localization=1.0,
            batch_size=None,
            num_burnin_steps=60,
            num_steps_bw_draws=10,
        ),
        num_chains=4,
        num_draws=80,
        progress=False,
    )
    predicted = n_beta / 40 * cross[:].double().numpy()
    correlation = np.corrcoef(predicted.ravel(), rise.ravel())[0, 1]
    slope = (predicted * rise).sum() / (predicted**2).sum()
    assert correlation > 0.9, correlation
    assert 0.9 < slope < 1.5, slope


# --- refused before any work -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"train": None}, TypeError, "train must be a DataLoader.*got NoneType"),
        ({"query": None}, TypeError, "query must be a DataLoader.*got NoneType"),
        ({"query": "sets"}, TypeError, "query must be a DataLoader.*got ProbeSets"),
        ({"query": 5}, TypeError, "query.* must be a DataLoader.*got int"),
        ({"rows": []}, ValueError, "rows must select at least one training sample"),
        ({"rows": [13]}, IndexError, "index 13 is out of range for 13 samples"),
        ({"centering": "draw"}, ValueError, "centering must be one of"),
        ({"num_draws": 1}, ValueError, "num_draws must be at least 2, got 1"),
        ({"seed": -1}, ValueError, "seed must be from 0"),
        ({"sampler": 3}, TypeError, "sampler must be a sampler"),
    ],
    ids=["no train", "no query", "sets", "a number", "no rows", "row", "centering", "draws", "seed", "sampler"],
)
def test_bad_arguments(
    problem: Any, fail_at: Any, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    train, query = halves(problem)
    if changes.get("query") == "sets":
        changes = {"query": lossk.ProbeSets(a=query)}
    loss = fail_at()
    with pytest.raises(error, match=message):
        lossk.cross_kernel(problem.model(), **{"train": train, "query": query, "loss": loss, **SMALL, **changes})
    assert loss.calls == 0


def test_the_model_comes_back(problem: Any, sgld: Any, fail_at: Any) -> None:
    train, query = halves(problem)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(), nn.Linear(5, 3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lossk.cross_kernel(model, train, query, sampler=sgld(), **SMALL)
    with pytest.raises(RuntimeError, match="stopped by the test"):
        lossk.cross_kernel(model, train, query, sampler=sgld(), loss=fail_at(60), **SMALL)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
