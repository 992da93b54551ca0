"""The sampler against closed forms: T1 and T2 by linear regression through build_kernel, T3, and the recursion."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from torch import Tensor, nn

import lossk
import oracles
from lossk.ops.philox import normals

Array = np.ndarray


# --- the configuration -------------------------------------------------------------------------------------------


def test_defaults() -> None:
    assert dataclasses.asdict(lossk.SGLD()) == {
        "lr": "auto",
        "n_beta": None,
        "localization": "auto",
        "metric": None,
        "batch_size": "auto",
        "num_burnin_steps": "auto",
        "num_steps_bw_draws": "auto",
        "preconditioner": None,
        "integrator": "auto",
        "control_variate": "auto",
        "noise_correction": "auto",
        "measure_acceptance": False,
        "params": None,
        "pilot_budget": None,
    }


def test_frozen_and_keyword_only() -> None:
    sampler = lossk.SGLD(lr=1e-4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        sampler.lr = 1e-3  # type: ignore[misc]
    with pytest.raises(TypeError):
        lossk.SGLD(1e-4)  # type: ignore[misc]
    assert sampler == lossk.SGLD(lr=1e-4)


# --- T1 and T2: linear regression --------------------------------------------------------------------------------


def half_square(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, targets = batch
    return 0.5 * (model(inputs) - targets).square().squeeze(1)


@dataclasses.dataclass(frozen=True)
class Regression:
    """Training data, other probe data, weights w* away from the fit, and a step so long that its bias shows.

    All losses are c * sum over the k outputs of 1/2 (x'w_o - y_o)^2.
    """

    name: str
    loss: Any
    outputs: int
    factor: float
    n_beta: float = 60.0
    localization: float = 20.0
    draws: int = 80
    chains: int = 32
    thin: int = 2
    burnin: int = 40

    def __post_init__(self) -> None:
        rng = np.random.default_rng(11)
        x, probe = rng.standard_normal((24, 4)), rng.standard_normal((12, 4))
        w = rng.standard_normal((4, self.outputs))
        single = {
            "x": x,
            "y": x @ w + 0.5 * rng.standard_normal((24, self.outputs)),
            "probe": probe,
            "answer": probe @ w + 0.5 * rng.standard_normal((12, self.outputs)),
            "w_star": w + 0.3 * rng.standard_normal((4, self.outputs)),
        }
        for key, value in single.items():  # what float32 holds is the problem; the closed form then takes it as exact
            object.__setattr__(self, key, value.astype(np.float32).astype(np.float64))
        a = oracles.posterior_precision(self.x, self.factor * self.n_beta, self.localization)
        object.__setattr__(self, "lr", 1.2 / np.linalg.eigvalsh(a)[-1])

    def target(self, n_beta: float | None = None, gamma: float | None = None, biased: bool = True) -> Array:
        """E of the chain-centered kernel of stationary chains: T1 at every lag with T2's covariance."""
        n_beta = self.factor * (self.n_beta if n_beta is None else n_beta)
        gamma = self.localization if gamma is None else gamma
        a = oracles.posterior_precision(self.x, n_beta, gamma)
        s = np.linalg.inv(a) if not biased else oracles.discretised_covariance(a, self.lr)
        b = np.linalg.matrix_power(np.eye(4) - self.lr / 2 * a, self.thin)
        crosses = [s]
        for _ in range(self.draws - 1):
            crosses.append(crosses[-1] @ b)
        total = np.zeros((self.draws, 12, 12))
        for o in range(self.outputs):
            mu = oracles.posterior_mean(self.x, self.y[:, o], self.w_star[:, o], n_beta, gamma)
            r = self.answer[:, o] - self.probe @ mu
            total += [oracles.regression_covariance(self.probe, r, c) for c in crosses]
        return self.factor**2 * oracles.centered_expectation(total)


CASES = [
    Regression("half square", half_square, 1, 1.0),
    Regression("mse of one output", "mse", 1, 2.0),
    Regression("mse of three outputs", "mse", 3, 2 / 3),
]


def float32(x: Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))


def linear(weight: Array) -> nn.Linear:
    """A layer without bias that maps [B, d] to [B, k]; weight [d, k]."""
    model = nn.Linear(weight.shape[0], weight.shape[1], bias=False)
    with torch.no_grad():
        model.weight.copy_(float32(weight.T))
    return model


@pytest.fixture(scope="module", params=CASES, ids=lambda c: c.name)
def sampled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Regression, Array, Array]:
    """(the problem, K of build_kernel, K of each chain from the stored traces)."""
    case: Regression = request.param
    store = tmp_path_factory.mktemp("regression") / "k.lossk"
    kernel = lossk.build_kernel(
        linear(case.w_star),
        (float32(case.probe), float32(case.answer)),
        train=(float32(case.x), float32(case.y)),
        loss=case.loss,
        sampler=lossk.SGLD(
            lr=case.lr,
            n_beta=case.n_beta,
            localization=case.localization,
            batch_size=None,
            num_burnin_steps=case.burnin,
            num_steps_bw_draws=case.thin,
        ),
        num_chains=case.chains,
        num_draws=case.draws,
        tile=16,
        out=store,
        backend="torch",
        seed=5,
        progress=False,
    )
    losses = np.asarray(zarr.open_group(str(store), mode="r")["losses"][:], dtype=np.float64)
    assert losses.shape == (case.chains, case.draws, 12)
    return case, kernel.to_numpy().astype(np.float64), np.stack([oracles.two_pass(c[None]) for c in losses])


def test_regression_has_the_kernel_of_the_discretised_chain(sampled: tuple[Regression, Array, Array]) -> None:
    case, k, chains = sampled
    np.testing.assert_allclose(k, chains.mean(axis=0), rtol=1e-3, atol=1e-5 * np.diag(k).max())
    z = oracles.z_scores(chains, case.target(), mean=k)
    assert np.all(np.abs(z) < 4.5), f"max |z| = {np.max(np.abs(z)):.2f}"
    assert 0.4 < np.sqrt(np.mean(z**2)) < 1.6, f"rms z = {np.sqrt(np.mean(z**2)):.2f}"


@pytest.mark.parametrize("wrong", ["n_beta * 1.3", "n_beta / 1.3", "no bias", "no localization"])
def test_the_same_test_refuses_a_wrong_target(sampled: tuple[Regression, Array, Array], wrong: str) -> None:
    case, k, chains = sampled
    target = {
        "n_beta * 1.3": lambda: case.target(n_beta=case.n_beta * 1.3),
        "n_beta / 1.3": lambda: case.target(n_beta=case.n_beta / 1.3),
        "no bias": lambda: case.target(biased=False),
        "no localization": lambda: case.target(gamma=0.0),
    }[wrong]()
    assert not oracles.consistent(oracles.z_scores(chains, target, mean=k))


# --- T3: minibatches ---------------------------------------------------------------------------------------------


def linear_on_the_probe(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """1/2 (x'w - y)^2 in training; for probe samples, marked in the last column, x'w itself: K = x S x' exactly."""
    inputs, targets = batch
    output = model(inputs[:, :-1]).squeeze(1)
    return torch.where(inputs[:, -1] > 0, output, 0.5 * (output - targets).square())


def test_minibatches_are_drawn_without_replacement() -> None:
    """S of T3, the gradient noise as large as the injected noise; without it, or with replacement, z fails."""
    n, m, d, draws, thin, n_beta, gamma = 20, 10, 3, 80, 2, 60.0, 10.0
    rng = np.random.default_rng(21)
    x = rng.standard_normal((n, d)).astype(np.float32).astype(np.float64)
    y = (x @ rng.standard_normal(d) + 1.5 * rng.standard_normal(n)).astype(np.float32).astype(np.float64)
    w_star = np.linalg.lstsq(x, y, rcond=None)[0]
    a = oracles.posterior_precision(x, n_beta, gamma)
    lr = 0.8 / np.linalg.eigvalsh(a)[-1]
    probe = np.concatenate([np.eye(d), [[1.0, -1.0, 0.5]]])
    mark = lambda rows, value: np.column_stack([rows, np.full(len(rows), value)])  # noqa: E731
    kept = lossk.sample_losses(
        linear(w_star[:, None]),
        (float32(mark(probe, 1.0)), torch.zeros(4)),
        train=(float32(mark(x, 0.0)), float32(y)),
        loss=linear_on_the_probe,
        sampler=lossk.SGLD(
            lr=lr, n_beta=n_beta, localization=gamma, batch_size=m, num_burnin_steps=40, num_steps_bw_draws=thin
        ),
        num_chains=32,
        num_draws=draws,
        backend="torch",
        seed=6,
        progress=False,
    )
    losses = np.asarray(kept.losses, dtype=np.float64)
    chains = np.stack([oracles.two_pass(c[None]) for c in losses])
    b = np.linalg.matrix_power(np.eye(d) - lr / 2 * a, thin)

    def target(s: Array) -> Array:
        lags = [s]
        for _ in range(draws - 1):
            lags.append(lags[-1] @ b)
        return oracles.centered_expectation(np.stack([probe @ c @ probe.T for c in lags]))

    f = lambda size: (n - size) / (size * (n - 1))  # noqa: E731
    as_if_replaced = n / (1 + (n - 1) / m)  # the batch size whose f without replacement is 1 / m
    assert f(as_if_replaced) == pytest.approx(1 / m)
    right = oracles.minibatch_covariance(x, y, w_star, n_beta, gamma, lr, m)
    replaced = oracles.minibatch_covariance(x, y, w_star, n_beta, gamma, lr, as_if_replaced)
    z = oracles.z_scores(chains, target(right))
    assert np.all(np.abs(z) < 4.5), f"z = {z}"
    assert not oracles.consistent(oracles.z_scores(chains, target(replaced)))
    assert not oracles.consistent(oracles.z_scores(chains, target(oracles.discretised_covariance(a, lr))))


@pytest.mark.parametrize(("n", "m"), [(21, 4), (21, 8), (21, 20), (300, 5), (5, 1)])
def test_minibatches_are_independent_uniform_subsets(n: int, m: int) -> None:
    """Seen from inside the loss: m distinct samples, each equally often, consecutive ones overlap by chance only."""
    seen: list[Tensor] = []

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, number = batch
        if torch.is_grad_enabled() and len(number) == m:
            seen.append(number.long())
        return half_square(model, (inputs, torch.zeros(len(inputs), 1)))

    chains, draws = 2, 400
    lossk.sample_losses(
        nn.Linear(2, 1),
        (torch.randn(n, 2), torch.arange(n).float()),
        loss=loss,
        sampler=lossk.SGLD(
            lr=1e-4, n_beta=5.0, localization=1.0, batch_size=m, num_burnin_steps=0, num_steps_bw_draws=1
        ),
        num_chains=chains,
        num_draws=draws,
        backend="torch",
        progress=False,
    )
    steps = chains * draws
    batches = torch.stack(seen[-steps:]).numpy()  # [chain-major step, m]; the pilot's come before
    member = np.zeros((steps, n))
    np.put_along_axis(member, batches, 1.0, axis=1)
    assert np.all(member.sum(axis=1) == m), "a sample occurs twice in a minibatch"
    p = m / n
    z = (member.sum(axis=0) - steps * p) / np.sqrt(steps * p * (1 - p))
    assert np.abs(z).max() < 4.5
    overlap = (member[1:] * member[:-1]).sum(axis=1)
    spread = m * p * (1 - p) * (n - m) / (n - 1)  # the hypergeometric variance
    assert abs(overlap.mean() - m * p) < 4.5 * np.sqrt(spread / len(overlap)) + 1e-12
    assert not np.array_equal(member[:draws], member[draws:]), "two chains use the same minibatches"


# --- the recursion -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preconditioner", [None, "rmsprop", "rmsprop-frozen"])
@pytest.mark.parametrize("seed", [0, 123456789])
def test_the_chain_is_the_stated_recursion(seed: int, preconditioner: Any) -> None:
    """w <- w - (eps/2) G (nbeta grad L + gamma (w - w*)) + sqrt(eps G) xi, in float64 with the same noise, each step.

    G = 1, or 1 / (sqrt(V) + 0.1) with V <- 0.99 V + 0.01 grad^2 from 0, frozen from the end of burn-in or not at all.

    Draws must fall on steps burn-in + a, + thin, ... with 0 <= a <= thin. Weights of order 1 in float32 drift from
    float64 by about steps x 4 u = 1e-5, and probe losses move by a few times as much: 1e-4 absolute.
    """
    case = CASES[0]
    lr = case.lr if preconditioner is None else case.lr / 10  # G is at most 10
    burnin, thin, draws, chains = 5, 3, 6, 3
    kept = lossk.sample_losses(
        linear(case.w_star),
        (float32(case.probe), float32(case.answer)),
        train=(float32(case.x), float32(case.y)),
        loss=case.loss,
        sampler=lossk.SGLD(
            lr=lr,
            n_beta=case.n_beta,
            localization=case.localization,
            batch_size=None,
            num_burnin_steps=burnin,
            num_steps_bw_draws=thin,
            preconditioner=preconditioner,
        ),
        num_chains=chains,
        num_draws=draws,
        backend="torch",
        seed=seed,
        progress=False,
    )
    losses = np.asarray(kept.losses, dtype=np.float64)
    for chain in range(chains):
        w = case.w_star[:, 0].copy()
        path, v = [w], np.zeros(4)
        for step in range(burnin + draws * thin + thin):
            grad = case.x.T @ (case.x @ w - case.y[:, 0]) / len(case.x)
            drift = case.n_beta * grad + case.localization * (w - case.w_star[:, 0])
            if preconditioner == "rmsprop" or (preconditioner == "rmsprop-frozen" and step < burnin):
                v = 0.99 * v + 0.01 * grad**2
            gain = np.ones(4) if preconditioner is None else 1 / (np.sqrt(v) + 0.1)
            xi = normals(seed, chain, step, 4).double().numpy()
            w = w - lr / 2 * gain * drift + np.sqrt(lr * gain) * xi
            path.append(w)
        exact = 0.5 * (np.stack(path) @ case.probe.T - case.answer[:, 0]) ** 2  # [step, N], after `step` steps
        starts = [burnin + a for a in range(thin + 1)]
        errors = [np.max(np.abs(losses[chain] - exact[s : s + draws * thin : thin])) for s in starts]
        assert min(errors) < 1e-4, f"chain {chain}: off by {min(errors):.3g} whichever step the draws begin at"


def test_default_n_beta_is_n_over_log_n(
    build: Callable[..., Any], problem: Any, sgld: Any, assert_same_kernel: Any
) -> None:
    n = problem.num_samples
    default = build(problem.model(), problem.data, sampler=sgld(n_beta=None))
    assert_same_kernel(default, build(problem.model(), problem.data, sampler=sgld(n_beta=n / math.log(n))))
    n = 9
    train = (problem.inputs[:n], problem.targets[:n])
    default = build(problem.model(), problem.data, train=train, sampler=sgld(n_beta=None))
    explicit = build(problem.model(), problem.data, train=train, sampler=sgld(n_beta=n / math.log(n)))
    assert_same_kernel(default, explicit)


def test_a_batch_as_large_as_the_data_is_the_full_gradient(
    build: Callable[..., Any], problem: Any, sgld: Any, assert_same_kernel: Any
) -> None:
    full = build(problem.model(), problem.data, sampler=sgld(batch_size=None))
    for batch_size in (problem.num_samples, 10 * problem.num_samples):
        assert_same_kernel(build(problem.model(), problem.data, sampler=sgld(batch_size=batch_size)), full)


def test_tied_weights_are_one_parameter() -> None:
    """f = (w + w) x on one shared scalar has precision nbeta 4 mean(x^2) + gamma; two parameters would differ."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) + self.second(x)

    model = Tied()
    with torch.no_grad():
        model.first.weight.fill_(0.25)
    before = model.first.weight
    x = np.array([[0.5], [1.0], [1.5]])
    y = 0.5 * x  # the fit is w = 1/4: mu = w*
    n_beta, gamma, draws, thin = 30.0, 20.0, 100, 2
    lr = 0.8 / (n_beta * 4 * np.mean(x**2) + gamma)
    kept = lossk.sample_losses(
        model,
        (float32(x), float32(y)),
        loss=half_square,
        sampler=lossk.SGLD(
            lr=lr, n_beta=n_beta, localization=gamma, batch_size=None, num_burnin_steps=30, num_steps_bw_draws=thin
        ),
        num_chains=24, num_draws=draws, backend="torch", progress=False,
    )  # fmt: skip
    assert model.first.weight is before
    assert model.second.weight is before
    chains = np.stack([oracles.two_pass(c[None]) for c in np.asarray(kept.losses, dtype=np.float64)])

    def target(reach: float) -> Array:
        """The outputs are reach * u * x for one normal mode u, whose precision is nbeta reach^2 mean(x^2) + gamma."""
        precision = n_beta * reach**2 * np.mean(x**2) + gamma
        s = oracles.discretised_covariance(np.array([[precision]]), lr)
        lags = [s * (1 - lr / 2 * precision) ** (thin * k) for k in range(draws)]
        return oracles.centered_expectation(
            np.stack([oracles.regression_covariance(reach * x, np.zeros(3), c) for c in lags])
        )

    assert oracles.consistent(oracles.z_scores(chains, target(2.0)))
    # Two copies that move separately act through (w1 + w2) / sqrt(2).
    assert not oracles.consistent(oracles.z_scores(chains, target(math.sqrt(2))))
