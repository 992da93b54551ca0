"""BAOAB against its exact law on a quadratic, its linear map, and what every sampler must do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from bench.oracle_problems import Copies, float32, of_chains, square_loss, tensors

import lossk
import oracles
from lossk.pilot import modes
from lossk.pilot.pilot import Pilot

COPIES, CHAINS, DRAWS, THIN = 24, 24, 40, 3
N_BETA, GAMMA, STIFFNESS = 60.0, 20.0, 1.5  # STIFFNESS is h^2 a_max; 4 is the limit of stability


@dataclass(frozen=True)
class Problem:
    """Linear regression in three weights, w* off the fit, 24 copies of it side by side in every chain."""

    x: np.ndarray
    y: np.ndarray
    w_star: np.ndarray
    probe: np.ndarray
    answer: np.ndarray

    @property
    def a(self) -> np.ndarray:
        return oracles.posterior_precision(self.x, N_BETA, GAMMA)

    @property
    def step_size(self) -> float:
        return float(np.sqrt(STIFFNESS / np.linalg.eigvalsh(self.a)[-1]))

    def arguments(self, sampler: Any) -> dict[str, Any]:
        return {
            "model": Copies(self.w_star, COPIES),
            "loader": tensors(self.probe, self.answer, COPIES),
            "train": (torch.tensor(self.x).float(), torch.tensor(self.y).float()),
            "loss": square_loss,
            "sampler": sampler,
            "num_chains": CHAINS,
            "num_draws": DRAWS,
            "progress": False,
        }

    def target(self, excess: float = 1.0) -> np.ndarray:
        """E of the chain-centered K: T1 with S = excess A^-1, T4's centering with the lags of the linear map."""
        values, vectors = np.linalg.eigh(self.a)
        step = np.linalg.matrix_power(modes.baoab_map(self.step_size, np.array(5.0), values), THIN)
        mu = oracles.posterior_mean(self.x, self.y, self.w_star, N_BETA, GAMMA)
        residual = self.answer - self.probe @ mu
        lags, power = [], np.broadcast_to(np.eye(2), step.shape)
        for _ in range(DRAWS):
            cross = (vectors * (excess * power[:, 0, 0] / values)) @ vectors.T
            lags.append(oracles.regression_covariance(self.probe, residual, cross))
            power = power @ step
        return oracles.centered_expectation(np.stack(lags))


@pytest.fixture(scope="module")
def regression() -> Problem:
    rng = np.random.default_rng(11)
    x, probe, w = (float32(rng.standard_normal(shape)) for shape in ((24, 3), (5, 3), 3))
    y = float32(x @ w + rng.standard_normal(24))
    w_star = float32(w + 0.3 * rng.standard_normal(3))
    return Problem(x, y, w_star, probe, float32(probe @ w + rng.standard_normal(5)))


def baoab(**changes: Any) -> lossk.BAOAB:
    settings: dict[str, Any] = {
        "step_size": 0.05, "friction": 5.0, "n_beta": 30.0, "localization": 5.0, "batch_size": 4,
        "num_burnin_steps": 3, "num_steps_bw_draws": 2,
    }  # fmt: skip
    return lossk.BAOAB(**{**settings, **changes})


def test_no_bias_at_a_long_step(regression: Problem) -> None:
    """S = A^-1 exactly at h^2 a_max = 1.5, where SGLD's excess would be 60 %; a law 5 % wider is refused."""
    sampler = baoab(
        step_size=regression.step_size, n_beta=N_BETA, localization=GAMMA, batch_size=None,
        num_burnin_steps=40, num_steps_bw_draws=THIN,
    )  # fmt: skip
    estimates = of_chains(lossk.sample_losses(**regression.arguments(sampler)).losses, COPIES)
    assert oracles.consistent(oracles.z_scores(estimates, regression.target()))
    assert not oracles.consistent(oracles.z_scores(estimates, regression.target(1.05)))


@pytest.mark.parametrize(("h", "friction", "a"), [(0.1, 2.0, 150.0), (0.3, 1.0, 1.0), (1.0, 30.0, 3.9)])
def test_the_map_leaves_its_law(h: float, friction: float, a: float) -> None:
    """M S M' + noise = S for S = diag(1/a, 1 - h^2 a / 4), the noise put in by hand where O puts it."""
    c = np.exp(-friction * h)
    after = np.array([[1, 0], [-h * a / 2, 1]]) @ np.array([[1, h / 2], [0, 1]]) @ np.array([[0], [1.0]])
    m = modes.baoab_map(h, np.array(friction), np.array(a))
    s = np.diag([1 / a, 1 - h * h * a / 4])
    np.testing.assert_allclose(m @ s @ m.T + (1 - c * c) * after @ after.T, s, rtol=1e-12, atol=1e-15)


def test_spread_from_the_trained_weights() -> None:
    """The share of the stationary variance after k steps from w = 0, v ~ N(0, 1), by iterating the covariance."""
    h, friction, a = 0.2, 3.0, 4.0
    m = modes.baoab_map(h, np.array(friction), np.array(a))
    s = np.diag([1 / a, 1 - h * h * a / 4])
    noise, now = s - m @ s @ m.T, np.diag([0.0, 1.0])
    for steps in range(1, 30):
        now = m @ now @ m.T + noise
        assert modes.spread(h, friction, a, a, steps) == pytest.approx(now[0, 0] * a, abs=1e-12)


@pytest.mark.parametrize("condition", [1.0, 30.0, 1e4])
def test_friction_and_spacing(condition: float) -> None:
    """The spacing keeps every mode below 1/e from there on; one step less does not; no other friction does better."""
    h, lowest = 1 / np.sqrt(condition), 1.0
    friction = modes.choose_friction(h, lowest, condition, 500)
    steps = modes.steps_to_forget(h, friction, lowest, condition, np.exp(-1), 500)
    assert all(modes.lag_correlation(h, friction, lowest, condition, steps + k) <= np.exp(-1) for k in range(60))
    if steps > 1:
        assert modes.lag_correlation(h, friction, lowest, condition, steps - 1) > np.exp(-1)
    for other in np.geomspace(0.3, 6.0, 9):
        assert modes.steps_to_forget(h, float(other), lowest, condition, np.exp(-1), 500) >= steps
    burnin = modes.steps_to_spread(h, friction, lowest, condition, 0.99, 20_000)
    assert modes.spread(h, friction, lowest, condition, burnin) >= 0.99


def test_control_variate_quietens(regression: Problem) -> None:
    """Minibatches of 4 of 24, w* the fit: without the control variate K's trace is several times too large.

    With it the noise is that of the per-sample Hessians alone. Measured here: 1.17 with it and 3.3 without.
    """
    fit = np.linalg.lstsq(regression.x, regression.y, rcond=None)[0]
    fitted = Problem(regression.x, regression.y, fit, regression.probe, regression.answer)
    settings = {
        "step_size": regression.step_size / 2, "n_beta": N_BETA, "localization": GAMMA, "num_burnin_steps": 40,
        "num_steps_bw_draws": 6,
    }  # fmt: skip
    exact = np.trace(
        oracles.regression_covariance(
            fitted.probe, fitted.answer - fitted.probe @ float32(fit), np.linalg.inv(fitted.a)
        )
    )
    ratio = {}
    for control in (True, False):
        arguments = fitted.arguments(baoab(**settings, control_variate=control))
        ratio[control] = np.trace(of_chains(lossk.sample_losses(**arguments).losses, COPIES).mean(axis=0)) / exact
    assert 0.85 < ratio[True] < 1.4, ratio
    assert ratio[False] > 2.5, ratio


@pytest.mark.parametrize("control", [True, False])
def test_restored_and_resumed_bitwise(resumed_is_whole: Any, control: bool) -> None:
    resumed_is_whole(baoab(control_variate=control), 4)


def test_everything_automatic(problem: Any, build: Any) -> None:
    kernel = build(problem.model(), problem.data, sampler=lossk.BAOAB(), num_draws=20)
    chosen = lossk.BAOAB(**kernel.meta["sampler"])
    pilot = kernel.meta["pilot"]
    stiff = Pilot(**pilot).steepest(chosen.localization)
    assert chosen.resolved
    assert 0.3 < chosen.step_size**2 * stiff < 2.0  # 1 at the trial's draws; the run's own show another steepest
    assert {line.split(" = ")[0] for line in kernel.meta["reasons"]} >= {"localization", "step_size", "friction"}
    assert kernel.diagnostics.llc is not None
    assert kernel.diagnostics.waic is not None


def test_backends_agree(problem: Any, build: Any) -> None:
    one, two = (build(problem.model(), problem.data, sampler=baoab(), backend=b) for b in ("torch", "cpp"))
    np.testing.assert_allclose(one.to_numpy(), two.to_numpy(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("step_size", 0.0), ("step_size", "big"), ("friction", -1.0), ("friction", float("nan")), ("n_beta", 0.0),
        ("localization", -1.0), ("batch_size", 0), ("num_burnin_steps", -1), ("num_steps_bw_draws", 0),
        ("control_variate", "auto"), ("params", "weight"),
    ],
)  # fmt: skip
def test_bad_settings(field: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=field):
        lossk.BAOAB(**{field: value})


def test_a_step_too_long_is_refused_or_named(problem: Any, build: Any) -> None:
    with pytest.raises(ValueError, match="step_size must be less than"):
        build(problem.model(), problem.data, sampler=lossk.BAOAB(step_size=10.0))
    with pytest.raises(lossk.DivergedError, match=r"chain 0 diverged at step \d+: .*; try step_size="):
        build(problem.model(), problem.data, sampler=baoab(step_size=10.0, batch_size=None), num_draws=200)
    with pytest.raises(ValueError, match="localization is 0"):
        build(problem.model(), problem.data, sampler=lossk.BAOAB(localization=0.0))


@pytest.mark.long("its error needs four chains, and their trial and burn-in take a minute")
def test_noise_that_a_control_variate_leaves_holds_the_step_back() -> None:
    """Curvatures over four decades, a weak pull: at h^2 a_max = 1 the samples' own curvatures heat stiff modes by 70 %.

    The trial chain measures that noise, h is shortened to its budget, and trace K is T1's within budget and error.
    """
    rng = np.random.default_rng(5)
    x, probe = (rng.standard_normal((rows, 20)) * np.geomspace(3, 0.03, 20) for rows in (600, 20))
    y = x @ rng.standard_normal(20) + 0.5 * rng.standard_normal(600)
    fit = np.linalg.lstsq(x, y, rcond=None)[0]
    model = torch.nn.Linear(20, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor(fit)[None])
    answer = probe @ fit + 0.5
    traces = lossk.sample_losses(
        model, (torch.tensor(probe).float(), torch.tensor(answer).float()),
        train=(torch.tensor(x).float(), torch.tensor(y).float()), loss="mse",
        sampler=lossk.BAOAB(n_beta=94.0, localization=5.0, batch_size=64), num_chains=4, num_draws=20, progress=False,
    )  # fmt: skip
    assert any(reason.startswith("step_size") and "foreseen bias" in reason for reason in traces.meta["reasons"])
    a = oracles.posterior_precision(x, 2 * 94.0, 5.0)  # "mse" has no factor 1/2
    truth = np.trace(4 * oracles.regression_covariance(probe, answer - probe @ fit, np.linalg.inv(a)))
    by_chain = traces.losses.double().var(dim=1).sum(dim=1)
    error = float(by_chain.std()) / 2
    assert float(by_chain.mean()) < 1.05 * truth + 4 * error
    assert float(by_chain.mean()) > 0.8 * truth - 4 * error
    assert error < 0.15 * truth
