"""Each planted fault has its verdict, and runs without fault are good."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lossk
from lossk.diagnostics import verdict
from lossk.diagnostics.bias import UNEVEN
from lossk.diagnostics.diagnostics import Diagnostics

Data = tuple[Tensor, Tensor]

UNKNOWN = dict.fromkeys(field.name for field in dataclasses.fields(Diagnostics))
FINE = {
    **UNKNOWN, "rhat": 1.0, "sample_rhat": 1.01, "ess": 300.0, "sample_ess": 200.0, "llc": 2.0, "llc_se": 0.1,
    "rise": 0.1, "foreseen_bias": 0.04, "gradient_noise_ratio": 0.02, "discretisation": 0.1, "stability": 0.6,
    "burnin_completeness": 0.99, "growth": 0.05, "growth_z": 1.0, "drift": 0.2, "drift_z": 1.0, "reliability": 0.95,
    "reliability_kernel": 0.93, "size_error": 0.03, "noise_floor": 0.2, "dead_share": 0.0, "acceptance": 0.05,
    "uninformed": 2.0, "unevenness": 1.2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "found", "advice"),
    [
        ({}, "good", "R would correlate 0.95"),
        ({"llc": -0.5}, "no minimum", "train on"),
        ({"llc": -0.2}, "good", ""),
        ({"stability": 1.4}, "step too large", "divide lr by 2.0"),
        ({"foreseen_bias": 0.29}, "step too large", "divide lr by 5.8"),
        ({"foreseen_bias": math.inf}, "step too large", "divide lr by inf"),
        ({"foreseen_bias": 0.3, "gradient_noise_ratio": 0.2}, "too much noise", "raise batch_size or divide lr by 6.0"),
        ({"foreseen_bias": 0.3, "gradient_noise_ratio": 0.3, "discretisation": None}, "too much noise", "step_size by"),
        ({"growth": 0.3, "growth_z": 5.0}, "not burned in", "num_burnin_steps"),
        ({"growth": 0.3, "growth_z": 3.5}, "good", ""),
        ({"burnin_completeness": 0.01}, "good", ""),
        ({"burnin_completeness": 0.01, "growth": None}, "not burned in", "1% of their stationary"),
        ({"drift": -1.0, "drift_z": -9.0}, "not burned in", "raise num_burnin_steps"),
        ({"rise": 1.5}, "diverged", "raise localization"),
        ({"dead_share": 0.6}, "too little signal", "lower n_beta"),
        ({"rhat": 1.2}, "chains disagree", "1.20"),
        ({"noise_floor": 0.7}, "too few draws for these neighbors", "0.70"),
        ({"sample_ess": 20.0}, "too few draws", "20 effective draws"),
        ({"reliability": 0.46}, "not determined", "R would correlate 0.46"),
        ({"reliability": 0.5}, "not determined", "draw 4.0 times as many"),
        ({"reliability": 0.75, "reliability_kernel": 0.5}, "not determined", "draw 4.0 times as many"),
        ({"reliability": -0.1}, "not determined", "draw more than 100 times as many"),
        ({"reliability_kernel": 0.5}, "not determined", "K would correlate 0.50"),
        ({"size_error": 0.2}, "not determined", "draw 4.0 times as many"),
        ({"size_error": 0.1, "unevenness": 9.0}, "not determined", "9.0 times the mean curvature); draw 4.0 times"),
        ({"size_error": 0.04, "unevenness": 9.0}, "good", ""),
        ({"size_error": 0.08, "unevenness": 2.0}, "good", ""),
        ({"rhat": None}, "unchecked", "num_draws"),
        ({"sample_rhat": None}, "unchecked", "no watched sample"),
    ],
)
def test_each_number_has_its_rule(changes: dict[str, float | None], found: str, advice: str) -> None:
    word, why = verdict.judge({**FINE, **changes})
    assert word == found, why
    assert advice in why
    assert "nan" not in why


def test_the_unknown_accuses_nobody() -> None:
    few = {"rhat": 1.0, "sample_rhat": 1.0, "ess": 300.0, "sample_ess": 200.0}
    assert verdict.judge({**UNKNOWN, **few})[0] == "good"
    assert verdict.judge(UNKNOWN)[0] == "unchecked"


def test_only_a_chain_that_tests_its_own_steps_has_them_rejected() -> None:
    assert verdict.judge(FINE, rejects=True)[0] == "steps rejected"
    assert "shorten step_size" in verdict.judge(FINE, rejects=True)[1]


def half_squares(model: nn.Module, batch: Data) -> Tensor:
    return 0.5 * (model(batch[0]).squeeze(1) - batch[1]).square()


def regression(seed: int, n: int = 60, d: int = 4) -> tuple[nn.Module, Data]:
    """Least squares at its fit; curvatures near 1."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator)
    y = x.sum(dim=1) + torch.randn(n, generator=generator)
    model = nn.Linear(d, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(x, y.unsqueeze(1)).solution.T)
    return model, (x, y)


def elsewhere(seed: int) -> tuple[nn.Module, Data]:
    """The same with weights that were never trained."""
    model, data = regression(seed)
    with torch.no_grad():
        model.weight.zero_()
    return model, data


class Product(nn.Module):
    """f = a b x with a = b = 0, where the loss has a saddle unless x says nothing about y."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.w.prod()


def saddle(seed: int) -> tuple[nn.Module, Data]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(60, 1, generator=generator)
    return Product(), (x, 2 * x.squeeze(1) + torch.randn(60, generator=generator))


def singular(seed: int) -> tuple[nn.Module, Data]:
    """Targets that x says nothing about: a = b = 0 is a minimum, and the curvature there is 0."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(60, generator=generator), torch.randn(60, generator=generator)
    return Product(), (x.unsqueeze(1), y - (x @ y) / (x @ x) * x)


def euler(**changes: Any) -> lossk.SGLD:
    """n_beta a = 20 to 40, at localization 2: a step at about a tenth of its budget, without minibatch noise."""
    settings = {"lr": 0.006, "n_beta": 20.0, "localization": 2.0, "batch_size": None, "num_burnin_steps": 50,
                "num_steps_bw_draws": 12}  # fmt: skip
    return lossk.SGLD(**{**settings, **changes})


def run(problem: tuple[nn.Module, Data], sampler: Any, *, draws: int = 100, seed: int = 0) -> Diagnostics:
    model, data = problem
    kernel = lossk.build_kernel(
        model, data, loss=half_squares, sampler=sampler, num_chains=4, num_draws=draws, seed=seed, progress=False
    )
    found = kernel.diagnostics
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("problem", "sampler", "found"),
    [
        (elsewhere, euler(), "no minimum"),
        (saddle, euler(), "no minimum"),
        (regression, euler(lr=0.04), "step too large"),
        (regression, euler(batch_size=1, n_beta=100.0, lr=0.002), "too much noise"),
        (partial(regression, d=20), euler(localization=0.01, num_burnin_steps=0, lr=4e-4, num_steps_bw_draws=2),
         "not burned in"),
        (regression, lossk.HMC(step_size=3.0, localization=2.0, n_beta=20.0), "steps rejected"),
        (
            regression,
            lossk.BAOAB(step_size=0.002, friction=1.0, n_beta=20.0, localization=2.0, num_burnin_steps=1,
                        num_steps_bw_draws=1, batch_size=None),
            "not burned in",
        ),
    ],
)  # fmt: skip
def test_planted_faults_are_named(problem: Callable[[int], tuple[nn.Module, Data]], sampler: Any, found: str) -> None:
    diagnostics = run(problem(1), sampler, draws=40)
    assert diagnostics.verdict == found, str(diagnostics)


def test_no_learning_coefficient_stands_where_there_is_no_minimum() -> None:
    found = run(elsewhere(0), euler())
    assert found.no_minimum
    assert found.llc is not None
    assert found.llc < 0
    first = str(found).splitlines()[0]
    assert first.startswith("LLC          none: w* is no minimum")


CLEAN = [
    *((euler(), seed) for seed in range(5)),
    *((euler(localization=localization), 5) for localization in (0.0, 0.01)),
    *((euler(integrator="leimkuhler-matthews", lr=0.04, num_steps_bw_draws=4, localization=5.0), s) for s in (6, 7)),
    (lossk.HMC(step_size=0.1, localization=2.0, n_beta=20.0, num_burnin_steps=20), 8),
    (lossk.BAOAB(step_size=0.1, friction=3.0, n_beta=20.0, localization=2.0, num_burnin_steps=100,
                 num_steps_bw_draws=10, batch_size=None), 9),
    (lossk.Laplace(n_beta=20.0, localization=2.0), 10),
    (lossk.SGLD(), 11),
]  # fmt: skip


@pytest.mark.parametrize(("sampler", "seed"), CLEAN)
def test_runs_without_fault_are_good(sampler: Any, seed: int) -> None:
    found = run(regression(seed), sampler, seed=seed)
    assert found.verdict == "good", str(found)


def test_a_law_whose_rare_draws_are_steep_asks_for_twice_the_precision() -> None:
    """At 400 draws the total variance of f = a b x is known to 9 % or worse; a linear model's would do at that."""
    found = run(singular(0), lossk.SGLD())
    assert found.unevenness is not None
    assert found.unevenness > UNEVEN
    assert found.size_error is not None
    assert found.size_error > verdict.UNEVEN_LIMIT
    assert found.verdict != "good", str(found)
    even = run(regression(0), lossk.SGLD())
    assert even.unevenness is not None
    assert even.unevenness < 1.1
