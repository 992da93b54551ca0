"""Losses per token: the training loss that they define, its minibatches and its n."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lossk
from lossk.data.reading import read_samples
from lossk.pilot.pilot import run_pilot
from lossk.pilot.trial import rise_bound
from lossk.probe.probe import probe_losses
from lossk.samplers.chain import Surroundings
from lossk.samplers.force import MinibatchForce
from lossk.samplers.samplers import fit
from lossk.timings import Timings
from token_problems import IGNORED, LOSSES, TokenModel, callable_loss, prepared, text, true_losses

Build = Callable[..., lossk.LossKernel]


@pytest.fixture
def model() -> TokenModel:
    return TokenModel()


@pytest.mark.parametrize("loss", LOSSES)
def test_full_gradient_is_that_of_the_mean_over_tokens(model: TokenModel, loss: str) -> None:
    data = text()
    task, _, train = prepared(model, data, LOSSES[loss])
    with task:
        value = task.gradient(train, torch.arange(11))
        found = task.grad.double().clone()
        double = copy.deepcopy(model).double().eval()
        double.zero_grad()
        truth = F.cross_entropy(double(data[0]).flatten(0, 1), data[1].flatten(), ignore_index=IGNORED)
        truth.backward()
        expected = task.flatten([p.grad for p in double.parameters()])
    assert value == pytest.approx(float(truth.detach()), rel=1e-5)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("loss", LOSSES)
def test_minibatches_are_unbiased_and_linear(model: TokenModel, loss: str) -> None:
    """Over all 3-subsets of 6 samples, the mean of L_B and of its gradient are L_n's; the mean over tokens is not."""
    data = tuple(t[:6] for t in text())
    task, _, train = prepared(model, data, LOSSES[loss])  # type: ignore[arg-type]
    subsets = [torch.tensor(s) for s in itertools.combinations(range(6), 3)]
    with task:
        full = task.gradient(train, torch.arange(6))
        gradient = task.grad.double().clone()
        values, mean = [], torch.zeros_like(gradient)
        per_sample = task.losses(train[:]).double()
        for subset in subsets:
            values.append(task.gradient(train, subset))
            assert values[-1] == pytest.approx(float(per_sample[subset].mean()), rel=1e-5)
            mean += task.grad.double() / len(subsets)
    assert per_sample[3] == 0
    assert np.mean(values) == pytest.approx(full, rel=1e-5)
    np.testing.assert_allclose(mean, gradient, rtol=1e-3, atol=1e-6 * float(gradient.abs().max()))
    truth, rows = true_losses(model, data), np.nonzero(data[1].numpy() != IGNORED)[0]  # type: ignore[arg-type]
    assert full == pytest.approx(truth.mean(), rel=1e-5)
    by_tokens = np.mean([truth[np.isin(rows, s.numpy())].mean() for s in subsets])
    assert abs(by_tokens - full) > 1e-4, "the two estimates must differ here for this test to mean anything"


@pytest.mark.parametrize("loss", LOSSES)
def test_control_variate_gives_the_full_gradient_at_the_trained_weights(model: TokenModel, loss: str) -> None:
    """Minibatches hold other numbers of tokens, and one sample none: g_B(w*) - g_B(w*) + g_n(w*) all the same."""
    task, _, train = prepared(model, text(), LOSSES[loss])
    with task:
        anchor_losses = torch.empty(11)
        probe_losses(task, train, anchor_losses)
        full = task.gradient(train, torch.arange(11)), task.grad.clone()
        sampler = lossk.SGLD(control_variate=True)
        around = Surroundings(
            task, train, anchor_losses.double(), 0, "torch", Timings(), fitted=fit(sampler, task, train, seed=0)
        )
        force = MinibatchForce(around, 3, 0, control_variate=True)
        for step in range(4):
            loss_value, excess = force.gradient(step)
            np.testing.assert_allclose(task.grad, full[1], rtol=1e-3, atol=1e-6 * float(full[1].abs().max()))
            assert abs(excess) < 1e-5
            assert abs(loss_value - full[0]) > 1e-3
    assert float(anchor_losses.double().mean()) == pytest.approx(full[0], rel=1e-5)


def test_many_positions_are_passed_in_parts(model: TokenModel) -> None:
    """Longer than one pass takes: the same gradient and the same rows."""
    data = text(num_samples=7, length=1500)
    task, probe, train = prepared(nn.Sequential(model.embed, model.head), data, "token_cross_entropy")
    assert task.loss.positions == 1500
    out = torch.empty(len(probe))
    with task:
        loss = task.gradient(train, torch.arange(7))
        probe.fill(task, out)
        np.testing.assert_allclose(out, true_losses(task.model, data), rtol=3e-6)
    assert loss == pytest.approx(float(out.double().mean()), rel=1e-5)


def test_the_training_loss_may_rise_by_a_share_of_the_unmasked_labels_entropy() -> None:
    targets = torch.tensor([[0, 1, IGNORED], [0, IGNORED, 1]])
    bound, _ = rise_bound("token_cross_entropy", read_samples((torch.zeros(2, 3), targets)))
    assert bound == pytest.approx(0.05 * math.log(2))


def test_everything_automatic(model: TokenModel) -> None:
    """Pilot, trial chain and all: what it chose holds the training loss to its bound, or nearly."""
    data = text(num_samples=60)
    kernel = lossk.build_kernel(
        model, data, loss="token_cross_entropy", num_chains=2, num_draws=10, progress=False, sampler=lossk.SGLD()
    )
    bound, _ = rise_bound("token_cross_entropy", read_samples(data))
    assert kernel.num_samples == int((data[1] != IGNORED).sum())
    assert any(f"of the {kernel.num_samples} training tokens" in reason for reason in kernel.meta["reasons"])
    assert -2 * bound < float(np.mean(kernel.meta["excess_trace"])) < 2 * bound


def test_n_is_the_number_of_tokens(model: TokenModel) -> None:
    """The default n_beta, the pilot's, and WBIC's; the excess loss of a still chain is zero."""
    data = text()
    n = int((data[1] != IGNORED).sum())
    sampler = lossk.SGLD(lr=1e-30, localization=1.0, num_burnin_steps=0, num_steps_bw_draws=1, batch_size=4)
    kernel = lossk.build_kernel(
        model, data, loss="token_cross_entropy", sampler=sampler, num_draws=4, num_chains=2, progress=False
    )
    assert kernel.meta["sampler"]["n_beta"] == pytest.approx(n / math.log(n))
    assert kernel.meta["config"]["num_train"] == n
    np.testing.assert_allclose(kernel.meta["excess_trace"], 0.0, atol=1e-6)
    wbic = kernel.diagnostics.wbic  # type: ignore[union-attr]
    assert wbic.value == pytest.approx(true_losses(model, data).sum(), rel=1e-4)  # type: ignore[union-attr]
    task, _, train = prepared(model, data, callable_loss)
    with task:
        pilot = run_pilot(task, train, lossk.SGLD(batch_size=4), seed=0)
    assert pilot.n_beta == pytest.approx(n / math.log(n))
    assert pilot.batch_factor == pytest.approx(7 / 40)  # minibatches are of samples
