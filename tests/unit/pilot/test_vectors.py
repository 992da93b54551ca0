"""Vectors of all weights: what the settings foretell, and what is counted."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lossk
from lossk.curvature import curvature
from lossk.data.reading import read_samples
from lossk.pilot.vectors import FULL, LANCZOS, WEIGHTS, chain_vectors, judging_vectors, most_vectors
from lossk.plan.pass_memory import peak_of
from lossk.run.judging import foreseen_vectors
from lossk.samplers.chain import Surroundings
from lossk.samplers.force import FULL_GRADIENT, full_gradient
from lossk.samplers.samplers import Sampler, make_chain
from lossk.task.losses import resolve_loss
from lossk.task.task import Task
from lossk.timings import Timings

DATA = torch.ones(24, 300, dtype=torch.float32, device="cpu"), torch.arange(24, device="cpu") % 10
MEASURES = (curvature.largest_curvature, curvature.gradient_variance, curvature.control_variance)
SLIGHT = 0.2  # of a vector: a batch and its activations
NUMBERS: dict[str, Any] = {"n_beta": 10.0, "localization": 10.0, "num_burnin_steps": 1, "num_steps_bw_draws": 1}

PLAIN = lossk.SGLD(lr=1e-6, batch_size=8, control_variate=False, integrator="euler", **NUMBERS)


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(300, 2000), nn.ReLU(), nn.Linear(2000, 10))


@pytest.mark.parametrize(
    "measure", [curvature.largest_curvature, curvature.gradient_variance, curvature.control_variance]
)
@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("iterations", [2, 4, 10])
def test_measuring(measure: Any, held_out: bool, iterations: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curvature, "CONVERGED", 0.0)  # all iterations
    train, task = read_samples(DATA), Task(network(), resolve_loss("cross_entropy"))
    one = 4 * task.num_weights
    with task:
        task.flat += 1e-3 * torch.randn(task.num_weights, generator=torch.Generator().manual_seed(1))
        given: curvature.Sample = {"most": 8, "held_out": held_out, "iterations": iterations}
        found = peak_of(lambda: measure(task, train, seed=0, **given)) / one
    allowed = LANCZOS + (iterations / 2 if held_out else 0)
    start = 1.0  # made by NumPy, and not seen by the count
    assert allowed - 4 < found + start <= allowed + SLIGHT


def test_the_gradient_of_a_control_variate() -> None:
    train, task = read_samples(DATA), Task(network(), resolve_loss("cross_entropy"))
    with task:
        found = peak_of(lambda: full_gradient(task, train)) / (4 * task.num_weights)
    assert FULL - 1 < found <= FULL + SLIGHT


@pytest.mark.parametrize(
    "sampler",
    [
        PLAIN,
        dataclasses.replace(PLAIN, control_variate=True),
        dataclasses.replace(PLAIN, noise_correction=True),
        dataclasses.replace(PLAIN, noise_correction=True, control_variate=True),
        dataclasses.replace(PLAIN, preconditioner="rmsprop"),
        dataclasses.replace(PLAIN, measure_acceptance=True),
        lossk.BAOAB(step_size=1e-3, friction=1.0, batch_size=8, **NUMBERS),
        lossk.BAOAB(step_size=1e-3, friction=1.0, batch_size=8, control_variate=False, **NUMBERS),
        lossk.Gaussian(sigma=1e-3),
    ],
)
def test_chains(sampler: Sampler) -> None:
    """Also with the copy of the state where a panel ends."""
    train, task = read_samples(DATA), Task(network(), resolve_loss("cross_entropy"))
    one = 4 * task.num_weights

    def run(around: Surroundings) -> None:
        chain = make_chain(sampler, around, 0)
        for _ in chain.run(2, None):
            chain.state()

    with task:
        fitted: dict[str, Tensor] = {}
        if getattr(sampler, "control_variate", False) is True:
            fitted[FULL_GRADIENT] = full_gradient(task, train)
        losses = torch.full((24,), 2.3, dtype=torch.float64, device="cpu")
        around = Surroundings(task, train, losses, 0, "torch", Timings(), fitted=fitted)
        found = peak_of(lambda: run(around)) / one + len(fitted) + WEIGHTS
    assert found <= chain_vectors(sampler) + 1.0 + SLIGHT  # and the gradient that a pass makes, which is counted there


def test_what_a_run_holds() -> None:
    chosen = lossk.SGLD()
    plain = PLAIN
    assert most_vectors(chosen, judged=False, piloted=True) == WEIGHTS + 1 + 3 + 2 + LANCZOS
    assert most_vectors(plain, judged=False, piloted=True) == WEIGHTS + LANCZOS + 3
    assert most_vectors(plain, judged=False, piloted=False) == chain_vectors(plain) == 4
    assert foreseen_vectors(plain, 1e9, 4, piloted=False) == judging_vectors(plain) == 4 + LANCZOS + 5
    assert foreseen_vectors(plain, 10.0, 4, piloted=False) == 4
    assert foreseen_vectors(lossk.Gaussian(sigma=0.1), 1e9, 4, piloted=True) == chain_vectors(lossk.Gaussian(sigma=0.1))
