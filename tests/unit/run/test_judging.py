"""What the verdict knows of the loss at a run's own draws: measured fairly on few samples, pooled, and acted upon."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lossk
from lossk.accumulate.runlog import RunLog
from lossk.curvature import curvature
from lossk.data.reading import read_samples
from lossk.diagnostics import diagnostics, verdict
from lossk.pilot import pilot
from lossk.run import judging
from lossk.samplers.chain import Chain
from lossk.samplers.stepping import SteppingChain
from lossk.store.commits import Commit
from lossk.task.losses import resolve_loss
from lossk.task.task import Task

MEASURES = (curvature.largest_curvature, curvature.gradient_variance, curvature.control_variance)


def half_squares(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return 0.5 * (model(batch[0]).squeeze(1) - batch[1]).square()


def regression(n: int, d: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """One direction leads; over few samples, what they have by chance in the others makes it larger still."""
    x, model = torch.randn(n, d), nn.Linear(d, 1, bias=False)
    x[:, 0] *= 1.7
    with torch.no_grad():
        model.weight.fill_(0.5)
    return model, (x, x.sum(dim=1) * 0.5 + torch.randn(n))


def truths(x: Tensor, residual: Tensor, moved: Tensor) -> tuple[float, float, float]:
    """lambda_max of the Hessian, of Cov g, and of Cov(g - g*) where the residuals of w* have `moved`."""
    x = x.double()

    def largest(gradients: Tensor) -> float:
        return float(torch.linalg.eigvalsh(gradients.T.cov(correction=0))[-1])

    hessian = float(torch.linalg.eigvalsh(x.T @ x / len(x))[-1])
    return hessian, largest(residual.double().unsqueeze(1) * x), largest(moved.double().unsqueeze(1) * x)


@pytest.mark.parametrize("measure", range(3))
def test_held_out_samples_take_the_bias_of_few_away(measure: int) -> None:
    """24 of 4,000 samples in 12 dimensions: with as many others, at most a third of what they alone say too much."""
    model, (x, y) = regression(4000, 12)
    train = read_samples((x, y))
    with Task(model, resolve_loss(half_squares)) as task:
        task.flat += 0.5 * torch.randn(12)
        residual = task.losses((x, y)).mul(2).sqrt()  # their sign does not matter
        moved = x @ (task.flat - task.anchor)
        truth = truths(x, residual, moved)[measure]
        before = task.flat.clone()
        alone, fair = (
            torch.tensor(
                [MEASURES[measure](task, train, seed=0, most=24, which=k, held_out=held_out) for k in range(120)]
            )
            for held_out in (False, True)
        )
        assert torch.equal(task.flat, before)
    excess, left = float(alone.mean()) / truth - 1, float(fair.mean()) / truth - 1
    errors = [3 * float(found.std()) / truth / math.sqrt(len(found)) for found in (alone, fair)]
    assert excess > errors[0]
    assert abs(left) < excess / 3 + errors[1]
    assert float(fair.std()) < float(alone.std())


@pytest.mark.parametrize("n", [1, 2, 31, 40])
def test_all_samples_are_all_there_is(n: int) -> None:
    """Not more samples than asked for: nothing is held out. Up to twice as many: what all say lies between the two."""
    model, (x, y) = regression(n, 3)
    with Task(model, resolve_loss(half_squares)) as task:
        found = [
            curvature.largest_curvature(task, read_samples((x, y)), seed=0, most=m, held_out=True) for m in (40, 24)
        ]
    truth = float(torch.linalg.eigvalsh(x.double().T @ x.double() / n)[-1])
    assert found[0] == pytest.approx(truth, rel=0.02)
    assert found[1] == pytest.approx(truth, rel=0.02 if n <= 24 else 0.3)


def test_the_leading_pair_is_an_eigenpair() -> None:
    matrix = torch.randn(50, 50, dtype=torch.float64)
    matrix = matrix @ matrix.T
    matrix[0, 0] += 400.0
    value, vector = curvature.leading_pair(lambda v: matrix @ v, torch.randn(50, dtype=torch.float64))
    values, vectors = torch.linalg.eigh(matrix)
    assert value == pytest.approx(float(values[-1]), rel=1e-2)
    assert abs(float(vector @ vectors[:, -1])) > 0.995
    assert float(vector.norm()) == pytest.approx(1.0)


def known_pilot(**changes: Any) -> pilot.Pilot:
    plain = pilot.Pilot(curvature=1.0, gradient_variance=2.0, n_beta=10.0, batch_factor=0.1, num_samples=9)
    return dataclasses.replace(plain, **changes)


def test_every_draw_counts_alike() -> None:
    nan = math.nan
    unseen = torch.full((3, 4), nan)
    told = {"curvature": torch.tensor([4.0, nan, 6.0]), "variance": torch.tensor([3.0, nan, 9.0])}
    plain = known_pilot().informed(**told, glances=unseen, localization=7.0, controlled=False)
    assert (plain.drawn_curvature, plain.drawn_variance, plain.drawn_times) == (5.0, 6.0, 2)
    assert plain.typical(7.0) == 5.0
    assert plain.loudest(7.0) == 6.0
    assert plain.control_variance is None
    # A trial at localization 14 found 10 at three draws: at 7, 1 + 9 * 2 = 19; of the variance, at one: 2 + 1 * 2 = 4.
    trial = {"drawn_curvature": 10.0, "drawn_localization": 14.0, "drawn_times": 3, "drawn_variance": 3.0}
    both = known_pilot(**trial).informed(**told, glances=unseen, localization=7.0, controlled=False)
    assert both.typical(7.0) == pytest.approx((3 * 19.0 + 10.0) / 5)
    assert both.loudest(7.0) == pytest.approx((4.0 + 12.0) / 3)
    # With a control variate, of which the trial found 1 there, 2 are left at 7.
    left = {**trial, "control_variance": 1.0, "control_localization": 14.0}
    controlled = known_pilot(**left).informed(**told, glances=unseen, localization=7.0, controlled=True)
    assert controlled.control_variance == pytest.approx((2.0 + 12.0) / 3)
    assert controlled.loudest(7.0) == pytest.approx(4.0)
    silent = torch.full((3,), nan)
    assert known_pilot(**trial).informed(silent, silent, unseen, localization=7.0, controlled=False) == known_pilot(
        **trial
    )
    full = known_pilot().informed(told["curvature"], silent, unseen, localization=7.0, controlled=False)
    assert full.drawn_variance is None
    assert full.loudest(7.0) == 2.0


@pytest.mark.parametrize("controlled", [False, True])
def test_what_is_measured_is_a_share_of_the_run(controlled: bool) -> None:
    cost = 77 * (2 if controlled else 1)  # forward passes a sample, about
    for passes in (0.0, 1e4, 1e5, 1e6, 1e7, 1e12):
        chains, samples = judging.judging_samples(passes, 4, controlled=controlled)
        assert chains * samples * cost <= 0.03 * passes
        assert (chains == 0) == (0.03 * passes < 32 * cost)
        assert samples == 0 or 32 <= samples <= curvature.DRAWN_SAMPLES
    assert judging.judging_samples(1e12, 4, controlled=controlled) == (4, 256)


@pytest.mark.parametrize(
    ("numbers", "found", "times"),
    [
        ({"stability": 1.01, "foreseen_bias": 0.01}, "step too large", "1.4"),
        ({"stability": 0.99, "foreseen_bias": 0.01}, "good", ""),
        ({"foreseen_bias": 0.29}, "step too large", "5.8"),
        ({"foreseen_bias": 0.09}, "good", ""),
    ],
)
def test_a_step_has_a_limit_where_it_is_stable_and_where_it_is_unbiased(
    numbers: dict[str, float], found: str, times: str
) -> None:
    names = (field.name for field in dataclasses.fields(diagnostics.Diagnostics))
    fine = {"sample_rhat": 1.0, "sample_ess": 500.0, "rhat": 1.0, "ess": 500.0}
    word, advice = verdict.judge({**dict.fromkeys(names), **fine, **numbers})
    assert word == found
    if times:
        assert f"divide lr by {times}" in advice


class Quartic(nn.Module):
    """Steeper away from its minimum at 0, where all samples' gradients agree."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(size))


def quartic(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    """sum (w^2 + 10 w^4) / 2 times 1 + a_i: gradients differ by a_i (w + 20 w^3), apart from a trifle."""
    square = model.w.square()
    each = (0.5 * square + 5.0 * square.square()).sum()
    return each * (1.0 + batch[0].squeeze(1)) + 1e-3 * batch[0].squeeze(1) * model.w.sum()


def scales() -> Tensor:
    """[400, 1], of mean 0."""
    found = torch.rand(400, 1, generator=torch.Generator().manual_seed(0)) - 0.5
    return found - found.mean()


def quartic_run(num_draws: int = 40, **settings: Any) -> lossk.LossKernel:
    numbers = {"n_beta": 20.0, "localization": 5.0, "num_burnin_steps": 100, "num_steps_bw_draws": 10}
    sampler = lossk.SGLD(**{**numbers, "batch_size": 8, **settings})
    return lossk.build_kernel(
        Quartic(50), (scales(), torch.zeros(400)), loss=quartic, sampler=sampler,
        num_chains=3, num_draws=num_draws, progress=False,
    )  # fmt: skip


@pytest.mark.parametrize("controlled", [False, True])
def test_noise_is_judged_where_the_chains_went(controlled: bool) -> None:
    """At w* all samples' gradients agree, and nothing is to be seen of the minibatches' noise. At a draw their
    covariance is Var(a) g g' with g = w + 20 w^3: of largest eigenvalue Var(a) |g|^2, whose mean is known by
    quadrature, and its standard error over three draws. A control variate takes nothing away: those of w* are equal."""
    found = quartic_run(num_draws=360, num_steps_bw_draws=3, lr=0.005, control_variate=controlled)
    measured, sampler = found.meta["pilot"], found.meta["sampler"]
    assert measured["drawn_times"] == 3
    w = np.linspace(-3, 3, 20_001)
    density = np.exp(-sampler["n_beta"] * (0.5 * w**2 + 5 * w**4) - sampler["localization"] / 2 * w**2)
    density /= density.sum()
    square = (w + 20 * w**3) ** 2
    mean = float((density * square).sum())
    error = math.sqrt(float((density * square**2).sum() - mean**2) / (50 * 3))
    scale = float(scales().var(correction=0)) * 50
    assert measured["gradient_variance"] < 1e-3 * scale * mean
    lambda_max = measured["control_variance" if controlled else "drawn_variance"]
    assert abs(lambda_max / scale - mean) < 4 * error + 0.05 * mean  # its samples are few: 5 % for Var(a) over them
    per_step = sampler["lr"] * sampler["n_beta"] ** 2 * (392 / (8 * 399)) / 4
    assert found.diagnostics.gradient_noise_ratio == pytest.approx(per_step * lambda_max)


def test_noise_that_nobody_has_measured_is_unknown() -> None:
    """A run too short to measure anything at its draws, with a control variate: it leaves no noise at w* itself."""
    model, data = regression(400, 3)
    sampler = lossk.SGLD(
        lr=1e-3, n_beta=10.0, localization=5.0, batch_size=8, num_burnin_steps=2, num_steps_bw_draws=1,
        control_variate=True,
    )  # fmt: skip
    kernel = lossk.build_kernel(
        model, data, loss=half_squares, sampler=sampler, num_chains=2, num_draws=4, progress=False
    )
    assert kernel.meta["pilot"]["drawn_times"] == 0
    assert kernel.diagnostics.gradient_noise_ratio is None


def test_automatic_runs_are_judged_at_their_own_draws_too() -> None:
    found = quartic_run(lr="auto", batch_size=None, num_burnin_steps="auto", num_steps_bw_draws="auto")
    measured = found.meta["pilot"]
    assert measured["drawn_times"] > 3
    assert measured["drawn_variance"] is not None  # the trial's: the run's own minibatches are all samples
    assert found.diagnostics.verdict != "step too large"
    assert 0.3 < found.diagnostics.stability < verdict.STABILITY_LIMIT
    assert 0 < found.diagnostics.discretisation <= found.diagnostics.stability**2


def test_measuring_changes_no_draw(monkeypatch: pytest.MonkeyPatch, assert_same_kernel: Any) -> None:
    measured = quartic_run(lr=0.005)
    monkeypatch.setattr(SteppingChain, "judge", Chain.judge)
    plain = quartic_run(lr=0.005)
    assert plain.meta["pilot"]["drawn_times"] == 0
    assert_same_kernel(measured, plain)


@pytest.mark.parametrize("error", [ValueError("not finite"), torch.OutOfMemoryError("no room")])
def test_what_cannot_be_measured_stays_unknown(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """At the very end of a run, nothing is lost for it."""

    def fail(*_: Any, **__: Any) -> float:
        raise error

    monkeypatch.setattr("lossk.samplers.stepping.largest_curvature", fail)
    found = quartic_run(lr=0.005)
    assert found.meta["pilot"]["drawn_curvature"] is None
    assert found.diagnostics.verdict != "unchecked"


def test_a_log_of_an_earlier_version_is_read() -> None:
    commit = {"chain": 1, "first_draw": 4, "step": 60, "excess": [0.1, 0.2], "distance": [1.0, 2.0],
              "acceptance": [math.nan] * 2, "curvature": [math.nan, 3.0]}  # fmt: skip
    draws = RunLog.read_draws(None, Commit.of(commit))  # type: ignore[arg-type]
    assert [draw.draw for draw in draws] == [4, 5]
    assert draws[1].curvature == 3.0
    assert all(math.isnan(draw.variance) for draw in draws)
