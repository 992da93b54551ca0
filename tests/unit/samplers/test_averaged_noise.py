"""SGLD with the noise of two steps averaged (Leimkuhler and Matthews 2013): its law, its chain, its automatic step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lossk
from lossk.diagnostics.bias import BIAS_BUDGET
from lossk.ops.philox import normals
from lossk.pilot.step_choice import STABILITY_BUDGET

Build = Callable[..., lossk.LossKernel]
COPIES, HEIGHTS = 6000, (1.0, 4.0, 19.0)  # weights in a group, and the curvature of each group
N_BETA, LOCALIZATION = 2.0, 2.0
STIFFEST = N_BETA * max(HEIGHTS) + LOCALIZATION  # 40


class Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(len(HEIGHTS), COPIES))


def power_loss(power: int) -> Callable[[Any, Any], Tensor]:
    """Training rows (x,): sum h w^power / power; probe rows (x, group): the group's mean of w^power."""

    def loss(model: Any, batch: Any) -> Tensor:
        powers = model.w**power
        if len(batch) == 1:
            return (powers.sum(1) @ torch.tensor(HEIGHTS) / power).expand(len(batch[0]))
        return powers.mean(1)[batch[1]]

    return loss


def means(power: int, lr: float, integrator: str, localization: float, burnin: int) -> tuple[np.ndarray, np.ndarray]:
    """E w^power of each group, and standard errors from 8 chains."""
    groups = torch.arange(len(HEIGHTS))
    traces = lossk.sample_losses(
        Weights(), (groups.float(), groups), train=(torch.zeros(2),), loss=power_loss(power), num_chains=8,
        num_draws=10, progress=False,
        sampler=lossk.SGLD(
            lr=lr, n_beta=N_BETA, localization=localization, batch_size=None, num_burnin_steps=burnin,
            num_steps_bw_draws=20, integrator=integrator,
        ),
    )  # fmt: skip
    chains = traces.losses.double().mean(dim=1).numpy()
    return chains.mean(axis=0), chains.std(axis=0, ddof=1) / 8**0.5


@pytest.mark.parametrize("share", [0.25, 0.6, 0.9])
def test_a_quadratic_has_its_exact_variance_at_every_stable_step(share: float) -> None:
    """Within 5 standard errors (0.15 %); Euler's law is off by lr a / 4, a hundred times more."""
    lr = 4 * share / STIFFEST
    truth = 1 / (N_BETA * np.array(HEIGHTS) + LOCALIZATION)
    found, error = means(2, lr, "leimkuhler-matthews", LOCALIZATION, burnin=60)
    assert np.all(np.abs(found - truth) < 5 * error), (found / truth - 1, error / truth)
    euler, error = means(2, lr, "euler", LOCALIZATION, burnin=60)
    biased = truth / (1 - lr / 4 / truth)
    assert np.all(np.abs(euler - biased) < 5 * error)


def test_a_quartic_is_off_by_the_second_order_only() -> None:
    """Its exact law: n_beta h w^4 / 4 ~ Gamma(1/4), E w^4 = 1 / (n_beta h). At half the step a first-order error halves
    (Euler's does), a second-order one quarters."""
    truth = 1 / (N_BETA * np.array(HEIGHTS))
    lr = 0.02
    bias = {}
    for integrator in ("euler", "leimkuhler-matthews"):
        found, error = means(4, lr, integrator, 0.0, burnin=500)
        bias[integrator] = (found / truth - 1)[-1], (error / truth)[-1]
    euler, averaged = bias["euler"], bias["leimkuhler-matthews"]
    assert euler[0] > 10 * euler[1]
    assert abs(averaged[0]) < euler[0] / 4 + 4 * averaged[1]


def test_the_recursion(build: Build, problem: Any) -> None:
    """Weight for weight: drift, and the mean of this step's and the next one's normals."""
    model, steps = nn.Linear(1, 1, bias=False), 7
    seen: list[float] = []

    def loss(model: Any, batch: Any) -> Tensor:
        if not torch.is_grad_enabled():
            seen.append(model.weight.item())
        return 0.5 * (model(batch[0]) - batch[1]).square().squeeze(1)

    x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [1.0]])
    lr, n_beta, localization = 0.05, 3.0, 1.5
    sampler = lossk.SGLD(
        lr=lr, n_beta=n_beta, localization=localization, batch_size=None, num_burnin_steps=0, num_steps_bw_draws=1,
        integrator="leimkuhler-matthews",
    )  # fmt: skip
    start = model.weight.item()
    lossk.sample_losses(
        model, (x, y), loss=loss, sampler=sampler, num_chains=1, num_draws=steps, seed=3, progress=False
    )
    w, expected = start, []
    for step in range(steps):
        slope = float((x.squeeze() * (w * x.squeeze() - y.squeeze())).mean())
        xi = [float(normals(3, 0, t, 1)[0]) for t in (step, step + 1)]
        w += -lr / 2 * (n_beta * slope + localization * (w - start)) + lr**0.5 * sum(xi) / 2
        expected.append(w)
    np.testing.assert_allclose(seen[-steps:], expected, rtol=1e-4, atol=1e-5)


def test_a_resumed_run_is_bitwise_the_whole_one(resumed_is_whole: Any, sgld: Any) -> None:
    resumed_is_whole(sgld(integrator="leimkuhler-matthews"), 9, panel=1)


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_backends_agree(build: Build, problem: Any, backend: str) -> None:
    sampler = lossk.SGLD(
        lr=1e-3, n_beta=30.0, localization=5.0, num_burnin_steps=3, num_steps_bw_draws=2,
        integrator="leimkuhler-matthews",
    )  # fmt: skip
    expected = build(problem.model(), problem.data, sampler=sampler, backend="torch").to_numpy()
    found = build(problem.model(), problem.data, sampler=sampler, backend=backend).to_numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_the_automatic_step_is_about_twelve_times_as_long(build: Build, problem: Any) -> None:
    """Each by the curvature at its own trial's draws."""
    law = {"n_beta": 30.0, "localization": 20.0, "batch_size": None}
    plain, averaged = (
        build(problem.model(), problem.data, sampler=lossk.SGLD(integrator=name, **law))
        for name in ("euler", "leimkuhler-matthews")
    )
    ratio = averaged.meta["sampler"]["lr"] / plain.meta["sampler"]["lr"]
    assert ratio == pytest.approx(STABILITY_BUDGET / BIAS_BUDGET, rel=0.25)
    assert averaged.diagnostics is not None
    assert 0.4**2 < averaged.diagnostics.discretisation < 1.1 * STABILITY_BUDGET**2
    assert any("of the stability limit" in reason for reason in averaged.meta["reasons"])


@pytest.mark.parametrize("given", [{"preconditioner": "rmsprop"}, {"measure_acceptance": True}])
def test_what_it_goes_without(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"integrator='leimkuhler-matthews' goes without {next(iter(given))}"):
        lossk.SGLD(integrator="leimkuhler-matthews", **given)


def test_unknown_integrators() -> None:
    with pytest.raises(ValueError, match=r"integrator must be one of .*got 'heun'"):
        lossk.SGLD(integrator="heun")  # type: ignore[arg-type]
