"""The pilot against exact eigenvalues, and the automatic settings against the budgets they promise."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lossk
from lossk.data.reading import read_samples
from lossk.diagnostics.bias import BIAS_BUDGET
from lossk.pilot import automatic
from lossk.pilot import pilot as pilots
from lossk.pilot.step_choice import STABILITY_BUDGET
from lossk.task.losses import resolve_loss
from lossk.task.task import Task


def half_squares(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Losses 1/2 (x'w - y)^2: mean Hessian X'X / n, gradient r_i x_i."""
    return 0.5 * (model(batch[0]).squeeze(1) - batch[1]).square()


def regression(n: int, d: int, condition: float) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    x = torch.randn(n, d, dtype=torch.float64) * torch.logspace(0, -0.5 * math.log10(condition), d, dtype=torch.float64)
    y = torch.randn(n, dtype=torch.float64)
    model = nn.Linear(d, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(x, y.unsqueeze(1)).solution.T)
    return model, (x.float(), y.float())


def pilot_of(model: nn.Module, data: Any, loss: Any, sampler: lossk.SGLD | None = None) -> pilots.Pilot:
    with Task(model, resolve_loss(loss)) as task:
        before = task.flat.clone()
        pilot = pilots.run_pilot(task, read_samples(data), sampler or lossk.SGLD(), seed=0)
        assert torch.equal(task.flat, before), "the pilot must leave the weights at w*"
    return pilot


@pytest.mark.parametrize("condition", [10.0, 1e4])
def test_pilot_measures_the_largest_eigenvalues(condition: float) -> None:
    """Power iteration stops at 2 % change between iterations: within 10 % of the truth, from below."""
    model, (x, y) = regression(300, 6, condition)
    pilot = pilot_of(model, (x, y), half_squares)
    hessian = (x.double().T @ x.double()) / len(x)
    residual = (x.double() @ model.weight.detach().double().T).squeeze(1) - y.double()
    gradients = residual.unsqueeze(1) * x.double()
    for found, matrix in ((pilot.curvature, hessian), (pilot.gradient_variance, gradients.T.cov(correction=0))):
        truth = float(torch.linalg.eigvalsh(matrix)[-1])
        assert 0.9 * truth <= found <= 1.01 * truth


def test_batch_factor_is_that_of_drawing_without_replacement() -> None:
    model, data = regression(300, 3, 10.0)
    pilot = pilot_of(model, data, half_squares, lossk.SGLD(batch_size=100))
    assert pilot.batch_factor == pytest.approx(200 / (100 * 299))
    assert pilot_of(model, data, half_squares, lossk.SGLD(batch_size=None)).batch_factor == 0.0


def test_a_dominating_negative_curvature_does_not_hide_the_largest() -> None:
    """Loss (3 a^2 - 20 b^2) / 2 + x'0: Hessian diag(3, -20)."""

    class Saddle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([0.5, 0.1]))

    def loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        value = 1.5 * model.w[0].square() - 10.0 * model.w[1].square()
        return value.expand(len(batch[0])) + 0.0 * batch[0].squeeze(1)

    pilot = pilot_of(Saddle(), (torch.randn(20, 1), torch.zeros(20)), loss)
    assert 2.5 <= pilot.curvature <= 3.2


def test_curvature_needs_no_second_derivative() -> None:
    """An autograd function that can be differentiated once; the curvature is that of the plain regression."""

    class OnceOnly(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, value: Tensor) -> Tensor:
            context.save_for_backward(value)
            return 0.5 * value.square()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(context: Any, grad: Tensor) -> Tensor:
            return grad * context.saved_tensors[0]

    model, data = regression(200, 4, 10.0)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return OnceOnly.apply(model(batch[0]).squeeze(1) - batch[1])

    found, wanted = pilot_of(model, data, loss), pilot_of(model, data, half_squares)
    assert found.curvature == pytest.approx(wanted.curvature, rel=1e-3)


class TiedTransformer(nn.Module):
    """One attention block over five tokens, input and output embedding tied."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.head = nn.Linear(16, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.block(self.embed(tokens)).mean(dim=1))


def classifiers() -> dict[str, tuple[nn.Module, tuple[Tensor, Tensor]]]:
    labels = torch.randint(0, 4, (96,))
    images = torch.randn(96, 3, 8, 8) + labels[:, None, None, None]
    convolution = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4)
    )
    flat = images.flatten(1)[:, :20]
    return {
        "mlp": (nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 4)), (flat, labels)),
        "convolutional with batch norm": (convolution, (images, labels)),
        "tied transformer": (TiedTransformer(), (torch.randint(0, 11, (96, 5)), labels)),
        "half precision": (nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 4)).half(), (flat, labels)),
    }


def train_a_little(model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    if next(model.parameters()).dtype != torch.float32:
        return
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data[0]), data[1]).backward()
        optimizer.step()


@pytest.mark.parametrize("name", list(classifiers()))
def test_everything_automatic_gives_a_kernel_within_its_budgets(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    model, data = classifiers()[name]
    train_a_little(model, data)
    kernel = lossk.build_kernel(model, data, sampler=lossk.SGLD(batch_size=32), num_chains=2, num_draws=12)
    diagnostics = kernel.diagnostics
    assert diagnostics is not None
    assert kernel.meta["pilot"]["drawn_curvature"] is not None
    assert diagnostics.foreseen_bias < 2 * BIAS_BUDGET  # chosen within it, judged by what the run's own draws showed
    assert diagnostics.burnin_completeness >= 0.98
    assert torch.isfinite(kernel.variance).all()
    assert not kernel.dead.any()
    told = capfd.readouterr().err
    table = dict(re.findall(r"^  (\w+) += (\S+)", told, flags=re.MULTILINE))
    for choice in ("n_beta", "localization", "lr", "num_burnin_steps", "num_steps_bw_draws"):
        assert kernel.meta["sampler"][choice] == pytest.approx(float(table[choice]), rel=1e-2)
    assert math.log2(kernel.meta["sampler"]["localization"]) * 2 == pytest.approx(
        round(math.log2(kernel.meta["sampler"]["localization"]) * 2)
    )
    assert "cost: " in told


def test_numbers_given_are_kept_and_only_the_rest_is_chosen() -> None:
    model, data = regression(60, 3, 10.0)
    sampler = lossk.SGLD(lr=1e-4, n_beta=20.0, num_steps_bw_draws=3)
    kernel = lossk.build_kernel(model, data, loss="mse", sampler=sampler, num_chains=1, num_draws=4, progress=False)
    chosen = kernel.meta["sampler"]
    assert (chosen["lr"], chosen["n_beta"], chosen["num_steps_bw_draws"]) == (1e-4, 20.0, 3)
    assert chosen["localization"] > 0


def test_no_localization_leaves_burn_in_to_the_user() -> None:
    model, data = regression(60, 3, 10.0)
    with pytest.raises(ValueError, match=r"num_burnin_steps.*localization is 0"):
        lossk.build_kernel(model, data, loss="mse", sampler=lossk.SGLD(localization=0.0), progress=False)


@pytest.mark.parametrize(
    ("sampler", "verdict"),
    [
        (lossk.SGLD(lr=2.0 / 20.0, n_beta=20.0, localization=1.0, num_burnin_steps=50), "step too large"),
        (
            lossk.SGLD(lr=3e-4, n_beta=0.1, localization=1.0, num_burnin_steps=10, num_steps_bw_draws=20),
            "not burned in",
        ),
        (lossk.SGLD(lr=2e-5, n_beta=5000.0, localization=500.0, num_burnin_steps=500, batch_size=1), "too much noise"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_broken_settings_are_named(sampler: lossk.SGLD, verdict: str) -> None:
    model, data = regression(60, 3, 2.0)
    kernel = lossk.build_kernel(
        model, data, loss=half_squares, sampler=sampler, num_chains=2, num_draws=20, progress=False
    )
    assert kernel.diagnostics.verdict == verdict, str(kernel.diagnostics)


def test_draws_that_have_forgotten_what_was_learnt_are_called_diverged() -> None:
    """Chains that agree and mix, around weights with which the network is no better than one that learnt nothing."""
    model, data = classifiers()["mlp"]
    train_a_little(model, data)
    wide = lossk.SGLD(lr=0.5, n_beta=0.01, localization=0.5, num_burnin_steps=50, num_steps_bw_draws=10)
    kernel = lossk.build_kernel(model, data, sampler=wide, num_chains=2, num_draws=30, progress=False)
    found = kernel.diagnostics
    assert found.rise > 0.5 * found.uninformed == pytest.approx(0.5 * math.log(4), rel=0.1)
    assert found.verdict == "diverged", str(found)
    assert lossk.LossKernel.from_traces(lossk.LossTraces(torch.rand(2, 9, 4))).diagnostics.uninformed is None


def test_a_law_is_foreseen_by_how_steep_it_will_be_there() -> None:
    """Curvature 2 at w*, 10 at draws of localization 50: at another, 2 + 8 * 50 / localization.

    The localization then solves lr gamma = 2 / 25 for an lr at 45 % of the stability limit there, not of the trial's,
    to a quarter of an octave.
    """
    model, _ = regression(10, 2, 10.0)
    pilot = pilots.Pilot(
        curvature=2.0, gradient_variance=0.0, n_beta=200.0, batch_factor=0.0, num_samples=10,
        drawn_curvature=10.0, drawn_localization=50.0,
    )  # fmt: skip
    with Task(model, resolve_loss(half_squares)) as task:
        chosen, _ = automatic.choose_settings(lossk.SGLD(batch_size=None), pilot, task, num_train=100)
        elsewhere = dataclasses.replace(pilot, drawn_localization=None)
        unmoved, _ = automatic.choose_settings(lossk.SGLD(batch_size=None), elsewhere, task, num_train=100)
    exact = (400.0 + math.sqrt(400.0**2 + 4 * 21.5 * 200 * 8 * 50.0)) / (2 * 21.5)  # (200 h + gamma) / 22.5 = gamma
    for found, law, curvature in ((chosen, exact, 2.0 + 8.0 * 50.0 / float(chosen.localization)),
                                  (unmoved, 2000 / 21.5, 10.0)):  # fmt: skip
        lr, localization = float(found.lr), float(found.localization)
        assert abs(math.log2(localization / law)) <= 0.25 + 1e-6
        assert localization == automatic.to_half_octave(localization)
        assert lr * (200.0 * curvature + localization) / 4 == pytest.approx(STABILITY_BUDGET)
    assert pilot.typical(50.0) == 10.0


def test_the_curvature_of_draws_grows_as_their_squared_distance() -> None:
    """L = sum (w^2 + w^4 / 2) / 2: h* = 1 and E h - h* = 3 E w^2, which goes as 1 / localization where that rules."""
    pilot = pilots.Pilot(
        curvature=1.0, gradient_variance=0.0, n_beta=1.0, batch_factor=0.0, num_samples=10,
        drawn_curvature=1.0 + 3.0 / 100.0, drawn_localization=100.0,
    )  # fmt: skip
    assert pilot.typical(200.0) == pytest.approx(1.0 + 3.0 / 200.0)
    assert pilot.typical(math.inf) == 1.0
    assert dataclasses.replace(pilot, drawn_stably=False).typical(math.inf) == 1.03
