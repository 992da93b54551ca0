"""HMC against exact laws, and the acceptance that SGLD measures against a float64 computation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from bench.oracle_laws import over_copies, total_covariance
from bench.oracle_problems import Copies, float32, square_loss, tensors
from bench.oracles_nonlinear import bessel, product_loss
from torch import Tensor, nn

import lossk
import oracles
from lossk.data.reading import read_samples
from lossk.ops.philox import normals
from lossk.samplers.metropolis import Energy, mala_acceptance, probability
from lossk.task.losses import resolve_loss
from lossk.task.task import Task

N_BETA, GAMMA = 60.0, 20.0


def regression() -> tuple[np.ndarray, ...]:
    """Linear regression in three weights, w* off the fit: x, y, w*, probe rows, their answers."""
    rng = np.random.default_rng(11)
    x, probe, w = (float32(rng.standard_normal(shape)) for shape in ((24, 3), (5, 3), 3))
    y = float32(x @ w + rng.standard_normal(24))
    return x, y, float32(w + 0.3 * rng.standard_normal(3)), probe, float32(probe @ w + rng.standard_normal(5))


@pytest.mark.parametrize(("stiffness", "leapfrog"), [(1.5, 4), (0.4, 1)], ids=["HMC", "MALA"])
def test_exact_law_at_any_step(stiffness: float, leapfrog: int) -> None:
    """T1 with S = A^-1 at steps at which the test refuses half the proposals (HMC) or a twelfth (MALA); a law 10 %
    wider is refused."""
    x, y, w_star, probe, answer = regression()
    a = oracles.posterior_precision(x, N_BETA, GAMMA)
    copies = 8
    sampler = lossk.HMC(
        step_size=float(np.sqrt(stiffness / np.linalg.eigvalsh(a)[-1])), num_leapfrog_steps=leapfrog, n_beta=N_BETA,
        localization=GAMMA, num_burnin_steps=30, num_steps_bw_draws=1 if leapfrog > 1 else 3,
    )  # fmt: skip
    traces = lossk.sample_losses(
        Copies(w_star, copies), tensors(probe, answer, copies),
        train=(torch.tensor(x).float(), torch.tensor(y).float()), loss=square_loss, sampler=sampler,
        num_chains=16, num_draws=80, progress=False,
    )  # fmt: skip
    k, chains = total_covariance(traces, copies)
    mu = oracles.posterior_mean(x, y, w_star, N_BETA, GAMMA)
    truth = oracles.regression_covariance(probe, answer - probe @ mu, np.linalg.inv(a))
    assert oracles.consistent(oracles.z_scores(chains, truth, k))
    assert not oracles.consistent(oracles.z_scores(chains, 1.1 * truth, k))


def test_singular_model() -> None:
    """T7: f = a b x at (kap, gamma) = (100, 1), exact up to Monte Carlo error; 20 % off is refused."""
    copies, y, kap, gamma = 8, torch.tensor([1.0, -1.0]), 100.0, 1.0
    sampler = lossk.HMC(step_size=0.07, num_leapfrog_steps=8, n_beta=kap, localization=gamma, num_burnin_steps=60)
    traces = lossk.sample_losses(
        Copies(np.zeros(2), copies), over_copies(copies, y), train=(y,), loss=product_loss, sampler=sampler,
        num_chains=10, num_draws=80, progress=False,
    )  # fmt: skip
    k, chains = total_covariance(traces, copies)
    lam, m = bessel(gamma, kap)
    truth = 2 * lam / kap * np.array([[1, -1], [-1, 1]]) + m / kap**2
    assert oracles.consistent(oracles.z_scores(chains, truth, k), max_z=4.0)
    assert not oracles.consistent(oracles.z_scores(chains, 1.25 * truth, k), max_z=4.0)


def half_square(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return 0.5 * (model(batch[0]).squeeze(1) - batch[1]).square()


@pytest.mark.parametrize("step", [0, 1, 2, 3])
@pytest.mark.parametrize("gain", [1.0, 0.3])
def test_measured_acceptance_is_the_metropolis_ratio(step: int, gain: float) -> None:
    """min(1, p(w') q(w | w') / p(w) q(w' | w)) from densities in float64, with the same noise; weights back bitwise."""
    x, y, w_star, _, _ = regression()
    model = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor(w_star)[None])
    lr = 0.06
    with Task(model, resolve_loss(half_square)) as task:
        train = task.place(read_samples((torch.tensor(x).float(), torch.tensor(y).float()), "train"))
        task.flat.add_(torch.tensor([0.1, -0.2, 0.05]))
        here = task.flat.clone()
        energy = Energy(task, train, n_beta=N_BETA, localization=GAMMA)
        gains = torch.tensor([gain, 1.0, 1.0])
        found = mala_acceptance(energy, lr=lr, seed=3, chain=2, step=step, root_gain=gains.sqrt())
        assert torch.equal(task.flat, here)
    w, g = here.double().numpy(), gains.double().numpy()
    xi = normals(3, 2, step, 3, stream=5).double().numpy()

    def u(w: np.ndarray) -> float:
        return N_BETA * 0.5 * np.mean((x @ w - y) ** 2) + GAMMA / 2 * np.sum((w - w_star) ** 2)

    def towards(w: np.ndarray) -> np.ndarray:
        return w - lr / 2 * g * (N_BETA * x.T @ (x @ w - y) / len(x) + GAMMA * (w - w_star))

    def log_q(end: np.ndarray, start: np.ndarray) -> float:
        return -np.sum((end - towards(start)) ** 2 / g) / (2 * lr)

    proposal = towards(w) + np.sqrt(lr * g) * xi
    exact = min(1.0, np.exp(u(w) - u(proposal) + log_q(w, proposal) - log_q(proposal, w)))
    assert found == pytest.approx(exact, rel=2e-4)
    assert exact < 0.999, "the case must be able to tell"


def test_sgld_measures_it_and_goes_on_unchanged(problem: Any, build: Any, sgld: Any, assert_same_kernel: Any) -> None:
    """Acceptance falls with lr and tends to 1; measuring changes no draw."""
    found = []
    for lr in (1e-6, 1e-3, 5e-2):
        kernel = build(problem.model(), problem.data, sampler=sgld(lr=lr, measure_acceptance=True), num_draws=30)
        found.append(kernel.diagnostics.acceptance)
    assert found[0] > 0.9999
    assert found[0] > found[1] > found[2] + 0.02
    plain = build(problem.model(), problem.data, sampler=sgld(lr=5e-2), num_draws=30)
    assert_same_kernel(plain, kernel)
    assert plain.diagnostics.acceptance is None
    assert plain.diagnostics.distance == kernel.diagnostics.distance > 0
    assert "acceptance" in str(kernel.diagnostics)
    assert "acceptance" not in str(plain.diagnostics)


@pytest.mark.parametrize("kind", ["rmsprop", "rmsprop-frozen"])
def test_preconditioned_sgld_measures_it(problem: Any, build: Any, sgld: Any, kind: str) -> None:
    """A step of 1e-6 times a gain of at most 10 is accepted; one of 5e-3 less often."""
    short, long = (
        build(problem.model(), problem.data, sampler=sgld(lr=lr, preconditioner=kind, measure_acceptance=True))
        for lr in (1e-6, 5e-3)
    )
    assert 1 >= short.diagnostics.acceptance > 0.999 > long.diagnostics.acceptance > 0


def test_old_diagnostics_are_read(problem: Any, build: Any) -> None:
    plain = build(problem.model(), problem.data).diagnostics.to_dict()
    del plain["acceptance"], plain["distance"]
    read = type(build(problem.model(), problem.data).diagnostics).from_dict(plain)
    assert read.acceptance is read.distance is None


def hmc(**changes: Any) -> lossk.HMC:
    return lossk.HMC(**{"step_size": 0.08, "localization": 5.0, "n_beta": 30.0, "num_leapfrog_steps": 3, **changes})


def test_restored_and_resumed_bitwise(resumed_is_whole: Any) -> None:
    resumed_is_whole(hmc(), 4)


def test_steps_too_long_are_rejected_not_taken(problem: Any, build: Any) -> None:
    """Trajectories that leave for infinity: the chain stays at w*, and says so."""
    kernel = build(problem.model(), problem.data, sampler=hmc(step_size=1e6))
    assert kernel.diagnostics.acceptance == 0.0
    assert kernel.dead.all()
    assert kernel.diagnostics.verdict == "steps rejected"


def test_probability_of_what_is_no_number() -> None:
    assert [probability(rise) for rise in (-3.0, 0.0, float("inf"), float("nan"))] == [1.0, 1.0, 0.0, 0.0]
    assert probability(1.0) == pytest.approx(np.exp(-1))


def test_default_n_beta(problem: Any, build: Any) -> None:
    kernel = build(problem.model(), problem.data, sampler=hmc(n_beta=None))
    assert kernel.meta["sampler"]["n_beta"] == pytest.approx(21 / np.log(21))
    assert kernel.meta["pilot"] is None
    assert kernel.diagnostics.llc is not None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("step_size", 0.0), ("step_size", "auto"), ("localization", -1.0), ("num_leapfrog_steps", 0), ("n_beta", -1.0),
        ("num_burnin_steps", -1), ("num_steps_bw_draws", 0), ("params", "weight"),
    ],
)  # fmt: skip
def test_bad_settings(field: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=field):
        hmc(**{field: value})
    with pytest.raises(TypeError, match="measure_acceptance"):
        lossk.SGLD(measure_acceptance="yes")  # type: ignore[arg-type]
