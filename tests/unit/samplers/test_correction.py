"""The corrected step, weight by weight: against the step written out with the minibatch's covariance formed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lossk
from lossk.errors import DivergedError
from lossk.samplers.correction import Correction
from stepped import Array, Reference, noise_of, stepped

Build = Callable[..., lossk.LossKernel]

SETTINGS: dict[str, Any] = {
    "lr": 0.01, "n_beta": 40.0, "localization": 3.0, "batch_size": 7, "num_burnin_steps": 0, "num_steps_bw_draws": 1,
    "control_variate": False,
}  # fmt: skip
AVERAGED = lossk.SGLD(**SETTINGS, integrator="leimkuhler-matthews", noise_correction=1.3)
EULER = lossk.SGLD(**SETTINGS, integrator="euler", noise_correction=True)


def classes(num: int = 23) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(num, 5, generator=generator), torch.arange(num) % 3


def classifier() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def entropy(model: nn.Module, batch: Any) -> Tensor:
    logits = model(batch[0].to(next(model.parameters()).dtype))
    return F.cross_entropy(logits, batch[1], reduction="none")


def tokens(num: int = 19) -> tuple[Tensor, Tensor]:
    """Some masked, a sample's share of the loss by its own number of tokens."""
    generator = torch.Generator().manual_seed(4)
    targets = torch.randint(0, 3, (num, 4), generator=generator)
    targets[torch.rand(num, 4, generator=generator) < 0.4] = -100
    return torch.randn(num, 4, 5, generator=generator), targets


TOKENS = tokens()
MEAN_TOKENS = float((TOKENS[1] != -100).sum()) / len(TOKENS[1])


def token_entropy(model: nn.Module, batch: Any) -> Tensor:
    logits = model(batch[0].to(next(model.parameters()).dtype))
    losses = F.cross_entropy(logits.flatten(0, 1), batch[1].flatten(), ignore_index=-100, reduction="none")
    return losses.view(batch[1].shape).sum(dim=1) / MEAN_TOKENS


def squares(model: nn.Module, batch: Any) -> Tensor:
    """Quadratic in the weights of a linear model."""
    inputs = batch[0].to(next(model.parameters()).dtype)
    return (model(inputs).squeeze(1) - batch[1]).square()


def linear() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return nn.Linear(5, 1), (classes()[0], torch.randn(23))


def mirrored(w: Array, sampler: lossk.SGLD, **how: Any) -> Array:
    """The engine's step 0 from w in a quadratic, the mean of the two that difference forwards and backwards."""
    model, data = linear()
    found = []
    with stepped(model, data, squares, sampler, seed=5, **how) as chain:
        for sign in (1, -1):
            chain.step = 0
            chain.task.flat.copy_(torch.from_numpy(w))
            right = chain._correction()
            assert right is not None
            chain._correction = lambda: Correction(right.move * sign, right.strength * sign)  # type: ignore[method-assign] # noqa: B023
            chain.advance()
            del chain._correction
            found.append(chain.task.flat.double().numpy().copy())
    return (found[0] + found[1]) / 2


@pytest.mark.parametrize("sampler", [EULER, AVERAGED])
@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize("gradient_batch", [1024, 3])
def test_in_a_quadratic_the_step_is_the_stated_one(sampler: lossk.SGLD, control: bool, gradient_batch: int) -> None:
    """To rounding: the difference of both signs is the derivative there, and the correction is a tenth of the noise."""
    model, data = linear()
    sampler = dataclasses.replace(sampler, control_variate=control)
    truth = Reference(model, data, squares)
    w = truth.anchor + 0.3 * np.random.default_rng(1).standard_normal(len(truth.anchor))
    w = w.astype(np.float32).astype(np.float64)
    expected = truth.step(w, sampler, 5, 0, 0)
    correction = expected - truth.step(w, dataclasses.replace(sampler, noise_correction=False), 5, 0, 0)
    found = mirrored(w, sampler, gradient_batch=gradient_batch)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(correction).max() + 3e-7)
    assert np.abs(correction).max() > 0.02 * np.abs(expected - w).max()


CASES = {
    "own loss": (classifier, classes(), entropy, entropy, {}),
    "cross entropy, compiled": (classifier, classes(), "cross_entropy", entropy, {"backend": "cpp"}),
    "cross entropy, torch": (classifier, classes(), "cross_entropy", entropy, {"backend": "torch"}),
    "torch's criterion": (classifier, classes(), nn.CrossEntropyLoss(), entropy, {"backend": "cpp"}),
    "torch's criterion, torch": (classifier, classes(), nn.CrossEntropyLoss(), entropy, {"backend": "torch"}),
    "tokens, compiled": (
        classifier, TOKENS, "token_cross_entropy", token_entropy, {"backend": "cpp", "mean_tokens": MEAN_TOKENS},
    ),
    "tokens, torch": (
        classifier, TOKENS, "token_cross_entropy", token_entropy, {"backend": "torch", "mean_tokens": MEAN_TOKENS},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sampler", [EULER, AVERAGED])
@pytest.mark.parametrize("gradient_batch", [1024, 2])
def test_a_short_step_is_the_stated_one(case: str, sampler: lossk.SGLD, gradient_batch: int) -> None:
    """The difference's error is of the next order in sqrt(lr): here some percent of the correction."""
    make, data, loss, plain, how = CASES[case]
    sampler = dataclasses.replace(sampler, lr=1e-5, n_beta=4000.0)
    truth = Reference(make(), data, plain)
    with stepped(make(), data, loss, sampler, seed=5, chain=2, gradient_batch=gradient_batch, **how) as chain:
        for step in range(4):
            w = chain.task.flat.double().numpy().copy()
            chain.advance()
            error, correction = errors_of(chain.task.flat.double().numpy(), w, truth, sampler, chain=2, step=step)
            assert error <= 0.05 * correction + 1e-6
            assert correction > 1e-4 * np.linalg.norm(noise_of(sampler, 5, 2, step, len(w)))


def errors_of(
    found: Array, w: Array, truth: Reference, sampler: lossk.SGLD, *, chain: int = 0, step: int = 0
) -> tuple[float, float]:
    """How far a step from w of seed 5 is from the stated one, and how long the correction is."""
    expected = truth.step(w, sampler, 5, chain, step)
    plain = truth.step(w, dataclasses.replace(sampler, noise_correction=0.0), 5, chain, step)
    return float(np.linalg.norm(found - expected)), float(np.linalg.norm(expected - plain))


def test_a_step_changes_by_the_strength() -> None:
    """Twice the strength is twice the correction, and 0 is the plain step to the bit."""
    found = {}
    for strength in (False, 0.0, 1.0, True, 2.0):
        sampler = dataclasses.replace(AVERAGED, noise_correction=strength)
        with stepped(classifier(), classes(), "cross_entropy", sampler) as chain:
            chain.advance()
            found[repr(strength)] = chain.task.flat.double().clone()
    assert torch.equal(found["0.0"], found["False"])
    assert torch.equal(found["1.0"], found["True"])
    one, two = found["1.0"] - found["0.0"], found["2.0"] - found["0.0"]
    np.testing.assert_allclose(two, 2 * one, rtol=0, atol=1e-6)
    assert float(one.abs().max()) > 1e-3


def test_half_precision_passes_take_the_differences_in_float32() -> None:
    found = {}
    for precision in (None, "bf16"):
        sampler = dataclasses.replace(AVERAGED, lr=1e-7, control_variate=True)
        with stepped(classifier(), classes(), "cross_entropy", sampler, precision=precision) as chain:
            chain.task.flat.add_(0.01)
            correction, index = chain._correction(), chain.force.minibatches[0]
            assert correction is not None
            task, train, anchor = chain.task, chain.around.train, chain.force.anchor_losses[index]
            for at_anchor in (None, anchor):
                weights = correction.weights(task, train, index, at_anchor)
                if not isinstance(weights, Tensor):
                    weights = weights(task.losses(train[index]))
                found[precision, at_anchor is None] = weights.double() - 1 / len(index)
            chain.advance()
            assert bool(torch.isfinite(chain.task.flat).all())
    for plain in (True, False):
        exact, half = found[None, plain], found["bf16", plain]
        assert float((half - exact).norm()) < 0.05 * float(exact.norm())


def test_without_minibatches_there_is_nothing_to_correct() -> None:
    found = []
    for correction in (True, False):
        for size in (None, 23):
            sampler = dataclasses.replace(AVERAGED, batch_size=size, noise_correction=correction)
            with stepped(classifier(), classes(), "cross_entropy", sampler) as chain:
                chain.advance()
                found.append(chain.task.flat.clone())
    assert all(torch.equal(flat, found[0]) for flat in found)


def test_minibatches_of_two_and_of_all_but_one() -> None:
    for size in (2, 22):
        sampler = dataclasses.replace(EULER, batch_size=size, lr=1e-5, n_beta=1000.0)
        truth = Reference(classifier(), classes(), entropy)
        with stepped(classifier(), classes(), entropy, sampler, seed=5) as chain:
            chain.advance()
            error, correction = errors_of(chain.task.flat.double().numpy(), truth.anchor, truth, sampler)
            assert error <= 0.1 * correction + 1e-6


def test_a_resumed_run_is_bitwise_the_whole_one(resumed_is_whole: Any) -> None:
    sampler = dataclasses.replace(
        AVERAGED, lr=1e-3, batch_size=4, num_burnin_steps=3, num_steps_bw_draws=3, control_variate=True
    )
    assert resumed_is_whole(sampler, 12, panel=1).meta["sampler"]["noise_correction"] == 1.3


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_backends_agree(build: Build, problem: Any, backend: str) -> None:
    sampler = dataclasses.replace(AVERAGED, lr=1e-3, batch_size=6, num_burnin_steps=3, num_steps_bw_draws=2)
    expected = build(problem.model(), problem.data, sampler=sampler, backend="torch").to_numpy()
    found = build(problem.model(), problem.data, sampler=sampler, backend=backend).to_numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3 * np.abs(expected).max())


def test_a_given_step_is_not_corrected_unless_asked(build: Build, problem: Any) -> None:
    given = {**SETTINGS, "lr": 1e-3, "batch_size": 6}
    kernel = build(problem.model(), problem.data, sampler=lossk.SGLD(**given))
    assert kernel.meta["sampler"]["noise_correction"] is False


def test_a_loss_that_the_noise_makes_infinite_is_a_divergence() -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        losses = entropy(model, batch)
        return losses if torch.is_grad_enabled() or not armed else losses / 0.0

    armed = False
    with stepped(classifier(), classes(), loss, AVERAGED) as chain:
        armed = True
        before = chain.task.flat.clone()
        with pytest.raises(DivergedError, match="minibatch loss nan"):
            chain.advance()
        assert torch.equal(chain.task.flat, before)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"preconditioner": "rmsprop"}, r"noise_correction=True goes without preconditioner, got 'rmsprop'"),
        ({"preconditioner": "rmsprop-frozen"}, r"noise_correction=True goes without preconditioner"),
        ({"batch_size": 1}, r"noise_correction=True needs minibatches of at least 2.*got batch_size=1"),
        ({"noise_correction": -1.0}, r"noise_correction must be finite and at least 0, got -1.0"),
        ({"noise_correction": float("nan")}, r"noise_correction must be finite"),
        ({"noise_correction": "yes"}, r"noise_correction must be one of \['auto'\], got 'yes'"),
        ({"noise_correction": None}, r"noise_correction must be True, False, 'auto' or a number, got None"),
    ],
)
def test_what_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        lossk.SGLD(**{"noise_correction": True, **given})


def test_auto_asks_for_nothing() -> None:
    assert lossk.SGLD(batch_size=1, preconditioner=None).correction == 0.0
    assert lossk.SGLD(preconditioner="rmsprop").correction == 0.0
