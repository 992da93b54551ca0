"""The trial chain: its statistics against known traces, and models that no measurement at w* reveals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lossk
import oracles
from lossk.data.reading import read_samples
from lossk.diagnostics.bias import BIAS_BUDGET
from lossk.pilot import automatic, trial, trial_chain
from lossk.pilot.effort import FULL
from lossk.pilot.step_choice import STABILITY_BUDGET
from lossk.samplers.chain import Surroundings
from lossk.samplers.force import FULL_GRADIENT, full_gradient
from lossk.task.losses import resolve_loss
from lossk.task.task import Task
from lossk.timings import Timings


def ar1(rho: float, draws: int, width: int) -> Tensor:
    x = torch.randn(draws + 200, width, dtype=torch.float64)
    for t in range(1, len(x)):
        x[t] = rho * x[t - 1] + math.sqrt(1 - rho**2) * x[t]
    return x[200:]


@pytest.mark.parametrize(("rho", "low", "high"), [(0.0, 1.0, 1.1), (0.5, 2.5, 3.3), (0.8, 7.0, 10.0)])
def test_autocorrelation_time_of_ar1(rho: float, low: float, high: float) -> None:
    """(1 + rho) / (1 - rho) = 1, 3, 9; centering and the median lower the longest by up to a fifth."""
    assert low <= trial_chain.autocorrelation_time(ar1(rho, 200, 64)) <= high


def test_autocorrelation_time_leaves_dead_samples_out() -> None:
    traces = torch.cat([ar1(0.8, 200, 32), torch.full((200, 64), 0.5, dtype=torch.float64)], dim=1)
    assert trial_chain.autocorrelation_time(traces) > 6.0
    assert trial_chain.autocorrelation_time(torch.ones(50, 3, dtype=torch.float64)) == 1.0


@pytest.mark.parametrize("rho", [0.5, 0.9, 0.99])
def test_spacing_is_the_cheapest_allowed(rho: float) -> None:
    measured = trial_chain.Autocorrelation(tuple(rho**k for k in range(2000)))
    assert measured.steps == pytest.approx((1 + rho) / (1 - rho))
    for probe_cost in (0.0, 10.0, 1000.0):
        found = trial.worth_spacing(measured, 1.0, probe_cost)
        assert rho**found <= trial.CLOSEST

        def cost(s: int, probe_cost: float = probe_cost) -> float:
            return (s + probe_cost) * (1 + rho ** (2 * s)) / (1 - rho ** (2 * s))

        least = min(cost(s) for s in trial.SPACINGS if rho**s <= trial.CLOSEST)
        assert cost(found) <= 1.05 * least * (1 + 1e-9)
        assert all(cost(s) > 1.05 * least * (1 - 1e-9) for s in trial.SPACINGS if s > found)
    assert trial.worth_spacing(measured, 1.0, 1000.0) > trial.worth_spacing(measured, 1.0, 0.0)


def test_spacing_follows_what_was_measured() -> None:
    """Averaged noise ties consecutive steps together: 0.62 after one step, where AR(1) of the same time has 0.46."""
    measured = trial_chain.Autocorrelation((1.0, 0.62, 0.2, 0.06))
    assert measured.steps == pytest.approx(2.76)
    assert (measured.at(0), measured.at(1), measured.at(1.5), measured.at(3.5), measured.at(9)) == (
        1.0, 0.62, pytest.approx(0.41), pytest.approx(0.03), 0.0,
    )  # fmt: skip
    assert measured.squares(1) == pytest.approx(1 + 2 * (0.62**2 + 0.2**2 + 0.06**2))
    assert measured.squares(2) == pytest.approx(1 + 2 * 0.2**2)
    assert trial.worth_spacing(measured, 1.0, 0.0) == 2
    slower = measured.slowed(3.0)
    assert slower.at(3) == pytest.approx(0.62)
    assert slower.steps == pytest.approx(3 * 2.76)
    # 4 (1 + 2 (0.48^2 + 0.11^2)) = 5.9 and 5 (1 + 2 (0.34^2 + 0.04^2)) = 6.2 count as alike; 6 (1 + 2 0.2^2) = 6.5
    assert trial.worth_spacing(slower, 1.0, 0.0) == 5


def test_a_drift_is_seen() -> None:
    steady = ar1(0.5, 200, 40)
    moving = steady + torch.linspace(0, 3, 200, dtype=torch.float64).unsqueeze(1)
    assert abs(trial_chain._drift(steady)[0]) < 4
    assert trial_chain._drift(steady)[1] <= 0.1
    assert trial_chain._drift(moving)[0] > 4
    assert trial_chain._drift(moving)[1] > 0.5


class Weights(nn.Module):
    """Weights without inputs; the loss gives them meaning."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(values))


def per_sample(value: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The same loss for every sample but for its own small slope, so that no sample is dead."""
    return value + 1e-3 * batch[0].squeeze(1) * value.detach().abs().sqrt()


def plain_data() -> tuple[Tensor, Tensor]:
    return torch.randn(40, 1), torch.zeros(40)


def settled(
    model: nn.Module, data: Any, loss: Any, shape: tuple[int, int] = (2, 24), **changes: Any
) -> lossk.LossKernel:
    chains, draws = shape
    return lossk.build_kernel(
        model, data, loss=loss, sampler=lossk.SGLD(**changes), num_chains=chains, num_draws=draws, progress=False
    )


def test_a_loss_that_only_grows_further_out_is_held_within_its_bound() -> None:
    """500 weights without curvature at w* but w^4 beyond: at w* nothing limits the spread; the trial does."""

    def loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return per_sample(10.0 * (model.w**4).sum() + 0.5 * model.w[0].square(), batch)

    kernel = settled(Weights(*[0.0] * 500), plain_data(), loss)
    rise = torch.tensor(kernel.meta["excess_trace"]).mean()
    assert 0 < rise <= 1.3 * trial.RISE_NATS
    reason = next(line for line in kernel.meta["reasons"] if line.startswith("localization"))
    assert "rise of the training loss" in reason or "another function" in reason


def test_a_wall_near_the_weights_does_not_make_the_run_diverge() -> None:
    """Curvature 1 at w*, 10^4 beyond |w| = 0.3: the trial explodes at the pilot's step and is tried with a shorter."""

    def loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        wall = (model.w.abs() - 0.3).clamp(min=0).square().sum()
        return per_sample(0.5 * model.w.square().sum() + 5e3 * wall, batch)

    kernel = settled(Weights(0.0, 0.0, 0.0), plain_data(), loss)
    assert torch.isfinite(kernel.variance).all()


def test_a_step_is_stable_where_the_draws_are_and_not_only_at_the_trained_weights() -> None:
    """L = sum (w^2 + 10 w^4) / 2 over 1,000 weights: curvature 1 at w*, 20 times that at draws.

    Beyond the budget there the chain would leave; within it E w^2 is that of exp(-n_beta L - gamma w^2 / 2), by
    quadrature, up to the second-order bias (2 %) and five standard errors.
    """
    copies, n_beta, localization = 1000, 2.0, 1.0

    def loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        square = model.w.square()
        if model.w.requires_grad and torch.is_grad_enabled():
            return (0.5 * square + 5.0 * square.square()).sum() + 0.0 * batch[0].squeeze(1)
        return square.mean() + 0.0 * batch[0].squeeze(1)

    traces = lossk.sample_losses(
        Weights(*[0.0] * copies), plain_data(), loss=loss,
        sampler=lossk.SGLD(n_beta=n_beta, localization=localization, batch_size=None),
        num_chains=4, num_draws=100, progress=False,
    )  # fmt: skip
    pilot = traces.meta["pilot"]
    assert pilot["drawn_curvature"] > 5 * pilot["curvature"]
    # The step was chosen by the trial's three draws; those of the run's own may differ by a few percent.
    assert pilot["drawn_times"] > FULL.measured
    assert traces.meta["sampler"]["lr"] * n_beta * pilot["drawn_curvature"] / 4 < 1.1 * STABILITY_BUDGET
    w = np.linspace(-3, 3, 20_001)
    density = np.exp(-n_beta * (0.5 * w**2 + 5 * w**4) - localization / 2 * w**2)
    truth = float((density * w**2).sum() / density.sum())
    by_chain = traces.losses[..., 0].double().mean(dim=1)
    assert abs(float(by_chain.mean()) / truth - 1) < 0.02 + 5 * float(by_chain.std()) / 2 / truth


def test_a_trial_of_no_use_ends_after_its_burn_in() -> None:
    """What it shows by then is what it would have shown of itself; of use, it goes on to the same end as unasked."""
    model, asked = nn.Linear(3, 2), []
    x = torch.randn(60, 3)
    train = read_samples((x, (x[:, 0] > 0).long()))
    sampler = lossk.SGLD(
        n_beta=15.0, localization=2.0, lr=0.03, batch_size=20, num_burnin_steps=40, num_steps_bw_draws=1,
        integrator="leimkuhler-matthews", control_variate=True,
    )  # fmt: skip
    trials = []
    with Task(model, resolve_loss("cross_entropy")) as task:
        losses, gradient = torch.cat([task.losses(train[torch.arange(60)])]).double(), full_gradient(task, train)
        around = Surroundings(task, train, losses, 0, "torch", Timings(), {FULL_GRADIENT: gradient})
        for verdict in (None, True, False):

            def of_use(found: trial_chain.Trial, verdict: bool | None = verdict) -> bool:
                asked.append(found)
                return bool(verdict)

            trials.append(trial_chain.run_trial(sampler, around, of_use=None if verdict is None else of_use))
            task.reset()
    unasked, kept, ended = trials
    assert kept == unasked
    assert kept.whole
    assert kept.steps > 300
    assert asked == [ended, ended]
    assert (ended.steps, ended.whole, ended.cut) == (40, False, True)
    assert not kept.cut
    assert ended.curvature is not None
    assert ended.noise is not None
    assert 0.5 < ended.curvature / kept.curvature < 2.0


@pytest.mark.parametrize(("uneven", "times"), [(False, 1), (True, trial_chain.LONGER)])
def test_a_trial_looks_longer_where_the_curvature_is_uneven(uneven: bool, times: int) -> None:
    """L = (a^2 + b^2) / 20 [+ (a b)^2 / 2]; what is asked is kept within `most`."""
    sampler = lossk.SGLD(
        n_beta=2.0, localization=1.0, lr=0.1, batch_size=None, num_burnin_steps=10, num_steps_bw_draws=1,
        integrator="leimkuhler-matthews", control_variate=False, noise_correction=False,
    )  # fmt: skip

    def loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return per_sample(0.5 * (0.1 * model.w.square() + (model.w.prod() ** 2 if uneven else 0.0)).sum(), batch)

    train = read_samples(plain_data())
    with Task(Weights(0.0, 0.0), resolve_loss(loss)) as task:
        losses = torch.cat([task.losses(train[torch.arange(40)])]).double()
        around = Surroundings(task, train, losses, 0, "torch", Timings(), {})
        found = trial_chain.run_trial(sampler, around)
        task.reset()
        half = trial_chain.run_trial(sampler, around, most=found.steps // 2)
    assert found.steps == 10 + times * trial_chain.steps_after_burnin(sampler)
    assert found.whole
    assert half.steps == found.steps // 2
    assert half.whole == uneven
    assert found.curvature is not None
    assert found.steepest is not None
    assert (found.steepest > 3 * found.curvature) == uneven


def test_one_huge_curvature_meets_the_bias_budget() -> None:
    """L = (1e6 a^2 + b^2 + c^2) / 2: variances within the 5 % budget, 5 standard errors over chains beside it."""

    def loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        scale = torch.tensor([1e3, 1.0, 1.0])
        return 0.5 * (scale * model.w).square().sum() + (scale * model.w * batch[0]).sum(dim=1)

    data = (torch.eye(3).repeat(16, 1), torch.zeros(48))
    centered = (torch.cat([data[0], -data[0]]), torch.zeros(96))
    traces = lossk.sample_losses(
        Weights(0.0, 0.0, 0.0), centered, loss=loss, sampler=lossk.SGLD(batch_size=None), num_chains=16, num_draws=100,
        progress=False,
    )  # fmt: skip
    sampler = traces.meta["sampler"]
    scale2 = torch.tensor([1e6, 1.0, 1.0], dtype=torch.float64)
    a = sampler["n_beta"] * scale2 + sampler["localization"]
    s = scale2 / a  # Var of scale * w; the quadratic part is shared by all samples
    truth = s + 0.5 * s.square().sum()
    by_chain = traces.losses.double().var(dim=1)[:, :3]  # [C, 3]
    found, error = by_chain.mean(dim=0), by_chain.std(dim=0) / 4
    assert torch.all(found - truth < BIAS_BUDGET * truth + 5 * error)
    assert torch.all(found - truth > -0.1 * truth - 5 * error)  # what chain centering takes at 100 draws


@pytest.mark.parametrize("condition", [1.0, 1e4])
def test_ill_conditioned_regression_has_the_closed_form(condition: float) -> None:
    """trace K by T1 within the bias budget and 5 standard errors."""
    x = torch.randn(200, 5, dtype=torch.float64) * torch.logspace(0, -0.5 * math.log10(condition), 5).double()
    y = x @ torch.ones(5, dtype=torch.float64) + torch.randn(200, dtype=torch.float64)
    model = nn.Linear(5, 1, bias=False)
    fit = torch.linalg.lstsq(x, y.unsqueeze(1)).solution
    with torch.no_grad():
        model.weight.copy_(fit.T)
    traces = lossk.sample_losses(
        model, (x.float(), y.float()), loss=lambda m, b: 0.5 * (m(b[0]).squeeze(1) - b[1]).square(),
        num_chains=16, num_draws=60, progress=False,
    )  # fmt: skip
    chosen = traces.meta["sampler"]
    a = oracles.posterior_precision(x.numpy(), chosen["n_beta"], chosen["localization"])
    residual = (y - x @ fit.squeeze(1)).numpy()
    truth = float(oracles.regression_covariance(x.numpy(), residual, torch.linalg.inv(torch.tensor(a)).numpy()).trace())
    by_chain = traces.losses.double().var(dim=1).sum(dim=1)  # [C] trace of K
    found, error = float(by_chain.mean()), float(by_chain.std()) / len(by_chain) ** 0.5
    assert found - truth < (BIAS_BUDGET) * truth + 5 * error
    assert found - truth > -0.1 * truth - 5 * error  # what chain centering takes at 60 draws of lag 1 below 1/e


def more_models() -> dict[str, tuple[nn.Module, Any, Any]]:
    x, y = torch.randn(80, 6), torch.randint(0, 3, (80,))
    saddle = Weights(0.0, 0.0)

    def saddle_loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        a, b = model.w
        return per_sample(a.square() - b.square() + b**4, batch)

    deep = nn.Sequential(nn.Linear(6, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 3, bias=False))
    for parameter in deep.parameters():
        nn.init.zeros_(parameter)
    return {
        "saddle": (saddle, plain_data(), saddle_loss),
        "deep linear at zero": (deep, (x, y), "cross_entropy"),
        "untrained": (nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 3)), (x, y),
                      "cross_entropy"),
        "regression network": (nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)), (x, 50 * torch.randn(80, 2)),
                               "mse"),
    }  # fmt: skip


# The regression network spaces its draws by a thousand steps, 2 x 24 draws are 48,500 steps and minutes: `make test`
# takes three, `make test-slow` all.
SHORT = {"regression network": (1, 3)}


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *((name, SHORT.get(name, (2, 24))) for name in more_models()),
        *(pytest.param(name, (2, 24), marks=pytest.mark.slow) for name in SHORT),
    ],
)
def test_no_model_diverges_at_automatic_settings(name: str, shape: tuple[int, int]) -> None:
    model, data, loss = more_models()[name]
    before = [p.detach().clone() for p in model.parameters()]
    kernel = settled(model, data, loss, shape, batch_size=16)
    assert torch.isfinite(kernel.variance).all()
    assert not kernel.dead.all()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert any(line.startswith("trial") for line in kernel.meta["reasons"])


def test_a_control_variate_is_chosen_where_noise_would_hold_the_step_back() -> None:
    """Least squares with large residuals and little curvature: gradients differ, and do so alike at w and w*."""
    x = torch.randn(3000, 4) * 0.3
    y = 30 * torch.randn(3000)
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(x, y.unsqueeze(1)).solution.T)
    kernel = lossk.build_kernel(
        model, (x[:50], y[:50]), train=(x, y), loss=lambda m, b: 0.5 * (m(b[0]).squeeze(1) - b[1]).square(),
        sampler=lossk.SGLD(batch_size=8, noise_correction=False), num_chains=2, num_draws=12, progress=False,
    )  # fmt: skip
    assert kernel.meta["sampler"]["control_variate"] is True
    assert kernel.diagnostics.gradient_noise_ratio <= BIAS_BUDGET * 1.06


def test_a_trial_too_short_for_flat_directions_does_not_space_the_draws() -> None:
    """localization given 2,000 times below the stiffness: they forget in 10,000s of steps, a trial has 2,000."""
    x = torch.randn(100, 3) * torch.tensor([3.0, 0.3, 0.003])
    model = nn.Linear(3, 1, bias=False)
    data = (x, x @ torch.ones(3) + torch.randn(100))
    traces = lossk.sample_losses(
        model, data, loss=lambda m, b: 0.5 * (m(b[0]).squeeze(1) - b[1]).square(),
        sampler=lossk.SGLD(localization=0.1, num_burnin_steps=10), num_chains=1, num_draws=2, progress=False,
    )  # fmt: skip
    assert traces.meta["sampler"]["num_steps_bw_draws"] == automatic.STEPS_CAP
    assert any("too short a trial" in reason for reason in traces.meta["reasons"])


def test_settings_given_as_numbers_are_judged_by_the_curvature_where_they_went() -> None:
    """L = sum (w^2 + 10 w^4) / 2: at w* the step is well within its limit, at the draws it is beyond it."""

    def loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        square = model.w.square()
        return (0.5 * square + 5.0 * square.square()).sum() + 1e-3 * batch[0].squeeze(1) * model.w.sum()

    sampler = lossk.SGLD(
        lr=0.03, n_beta=2.0, localization=1.0, batch_size=None, num_burnin_steps=200, num_steps_bw_draws=20
    )
    kernel = lossk.build_kernel(
        Weights(*[0.0] * 200),
        (torch.randn(400, 1), torch.zeros(400)),
        loss=loss,
        sampler=sampler,
        num_chains=2,
        num_draws=20,
        progress=False,
    )
    pilot = kernel.meta["pilot"]
    assert sampler.lr * (2.0 * pilot["curvature"] + 1.0) / 4 < 0.1
    assert pilot["drawn_curvature"] > 5 * pilot["curvature"]
    assert kernel.diagnostics.verdict == "step too large", str(kernel.diagnostics)
    assert kernel.meta["timings"]["curvature"] > 0
