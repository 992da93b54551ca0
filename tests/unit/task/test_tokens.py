"""Losses per token: which tokens are rows, a closed form for their kernel, the store, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lossk
import oracles
from token_problems import IGNORED, LOSSES, TokenModel, callable_loss, prepared, text, true_losses

Build = Callable[..., lossk.LossKernel]


@pytest.fixture
def model() -> TokenModel:
    return TokenModel()


# --- the rows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
def test_rows_are_the_unmasked_tokens(model: TokenModel, loss: str) -> None:
    data = text()
    task, probe, _ = prepared(model, data, LOSSES[loss])
    expected = (data[1] != IGNORED).nonzero()
    assert torch.equal(probe.tokens, expected)  # type: ignore[arg-type]
    assert 3 not in expected[:, 0]
    assert (expected[:, 0] == 4).sum() == 1
    out = torch.empty(len(probe))
    with task:
        task.flat += 0.05 * torch.randn_like(task.flat)
        probe.fill(task, out)
        truth = true_losses(model, data)
    np.testing.assert_allclose(out, truth, rtol=3e-6, atol=1e-6 if loss == "callable" else 0)


def test_small_token_losses_keep_their_digits() -> None:
    """A winning token of loss near 1e-9: float32 log-softmax gives 0."""
    model = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.eye(3) * 21)
    data = torch.eye(3).expand(2, 3, 3).contiguous(), torch.arange(3).expand(2, 3).contiguous()
    task, probe, _ = prepared(model, data, "token_cross_entropy")
    out = torch.empty(6)
    with task:
        probe.fill(task, out)
    np.testing.assert_allclose(out, np.full(6, np.log1p(2 * np.exp(-21.0))), rtol=2e-6)


@pytest.mark.parametrize("count", [1, 2])
def test_few_samples_and_positions(build: Build, model: TokenModel, count: int) -> None:
    """One sample of five positions; two samples of one position."""
    data = (torch.randint(0, 7, (count, 5 if count == 1 else 1)), torch.ones(count, 5 if count == 1 else 1).long())
    kernel = build(model, data, loss="token_cross_entropy")
    assert kernel.num_samples == data[1].numel()
    assert np.isfinite(kernel.to_numpy()).all()
    assert not bool(kernel.dead.any())


@pytest.mark.parametrize("loss", LOSSES)
def test_one_unmasked_position_is_the_kernel_per_sample(build: Build, problem: Any, loss: str) -> None:
    """T = 1: bitwise where the pass is the same one."""

    class Unsqueezed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = problem.model()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.squeeze(1)).unsqueeze(1)

    def per_sample(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    inputs, targets = problem.data
    plain = build(problem.model(), problem.data, loss="cross_entropy" if loss == "named" else per_sample)
    tokens = build(Unsqueezed(), (inputs[:, None], targets[:, None]), loss=LOSSES[loss])
    assert plain.tokens is None
    assert torch.equal(tokens.tokens[:, 0], torch.arange(21))  # type: ignore[index]
    np.testing.assert_allclose(tokens.to_numpy(), plain.to_numpy(), rtol=1e-4, atol=1e-7 * float(plain.variance.max()))
    if loss == "callable":
        np.testing.assert_array_equal(tokens.to_numpy(), plain.to_numpy())


# --- a closed form -----------------------------------------------------------------------------------------------


def token_half_squares(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    inputs, targets, mask = batch
    return 0.5 * (model(inputs).squeeze(2) - targets).square(), mask


def test_tokens_of_a_linear_model_have_the_kernel_of_quadratic_losses() -> None:
    """T1 with T2's discretised covariance, by z scores over 32 chains: the tokens are the samples of the regression."""
    n, length, d, gamma, lr, n_beta = 9, 4, 3, 5.0, 0.02, 20.0
    rng = np.random.default_rng(1)
    x = rng.standard_normal((n, length, d)).astype(np.float32)
    y = (x.sum(axis=2) + rng.standard_normal((n, length))).astype(np.float32)
    mask = rng.random((n, length)) < 0.6
    mask[2] = False
    flat_x, flat_y = x[mask].astype(np.float64), y[mask].astype(np.float64)
    w_star = np.linalg.lstsq(flat_x, flat_y, rcond=None)[0]
    model = nn.Linear(d, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(w_star).float())
    traces = lossk.sample_losses(
        model,
        (x, y, mask),
        loss=token_half_squares,
        sampler=lossk.SGLD(
            lr=lr, n_beta=n_beta, localization=gamma, batch_size=None, num_burnin_steps=40, num_steps_bw_draws=8
        ),
        num_chains=32,
        num_draws=40,
        progress=False,
    )
    np.testing.assert_array_equal(traces.tokens, np.argwhere(mask))
    precision = oracles.posterior_precision(flat_x, n_beta, gamma)
    residual = flat_y - flat_x @ w_star
    lags = [
        oracles.regression_covariance(flat_x, residual, oracles.lag_covariance(precision, lr, 8 * k)) for k in range(40)
    ]
    truth = oracles.centered_expectation(np.array(lags))
    estimates = np.stack([np.cov(chain.double().numpy().T) for chain in traces.losses])
    z = oracles.z_scores(estimates, truth)
    assert oracles.consistent(z), f"max |z| {np.abs(z).max():.2f}, rms {np.sqrt((z**2).mean()):.2f}"
    kernel = lossk.LossKernel.from_traces(traces)
    np.testing.assert_array_equal(kernel.tokens, traces.tokens)
    np.testing.assert_allclose(kernel.to_numpy(), estimates.mean(axis=0), rtol=1e-3, atol=1e-5 * truth.max())


# --- kept on disk ------------------------------------------------------------------------------------------------


def test_tokens_are_kept(build: Build, model: TokenModel, assert_same_kernel: Any, tmp_path: Path) -> None:
    """Saved and opened, from traces, written by a run, and by a run that was killed and resumed."""
    data = text()
    kernel = build(model, data, loss="token_cross_entropy")
    assert "tokens" in repr(kernel)
    kernel.save(tmp_path / "saved.lossk")
    build(model, data, loss="token_cross_entropy", out=tmp_path / "whole.lossk")

    class Stopped(Exception):
        pass

    calls, last = 0, -1

    def stops(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        if calls == last:
            raise Stopped
        return callable_loss(model, batch)

    reference = build(model, data, loss=stops)
    calls, last = 0, calls - 12  # in the last but one of its panels
    with pytest.raises(Stopped):
        build(model, data, loss=stops, out=tmp_path / "resumed.lossk")
    assert 0 < len((tmp_path / "resumed.lossk" / "commits.jsonl").read_text().splitlines()) < 4
    resumed = build(model, data, loss=stops, out=tmp_path / "resumed.lossk", resume=True)
    assert_same_kernel(resumed, reference)
    for name in ("saved", "whole", "resumed"):
        opened = lossk.open(tmp_path / f"{name}.lossk")
        assert torch.equal(opened.tokens, (data[1] != IGNORED).nonzero())  # type: ignore[arg-type]
        assert_same_kernel(opened, reference if name == "resumed" else kernel)


def test_a_resume_under_another_mask_is_refused(build: Build, model: TokenModel, tmp_path: Path) -> None:
    data, out = text(), tmp_path / "k.lossk"
    drop = [0]

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        losses, mask = callable_loss(model, batch)
        return losses, mask & (torch.arange(5) >= drop[0])

    build(model, data, loss=loss, out=out)
    assert json.loads((out / "config.json").read_text())["fingerprints"]["tokens"]
    drop[0] = 1
    with pytest.raises(lossk.StoreError, match="holds another run"):
        build(model, data, loss=loss, out=out, resume=True)


def test_traces_check_their_tokens() -> None:
    losses = np.random.default_rng(0).random((2, 3, 4), np.float32)
    assert lossk.LossTraces(losses, tokens=np.zeros((4, 2), np.int32)).tokens.dtype == torch.int64  # type: ignore[union-attr]
    for wrong in (np.zeros((3, 2), int), np.zeros(4, int), np.zeros((4, 2))):
        with pytest.raises(ValueError, match=r"tokens must be integers of shape \[4, 2\]"):
            lossk.LossTraces(losses, tokens=wrong)


# --- refused -----------------------------------------------------------------------------------------------------


def returning(change: Callable[[Tensor, Tensor], Any]) -> Any:
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Any:
        return change(*callable_loss(model, batch))

    return loss


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda losses, mask: losses, r"\[8, 5\].*return \(losses \[B, T\], mask \[B, T\] bool\)"),
        (lambda losses, mask: (losses, mask.float()), r"mask \[8, T\] bool.*\[8, 5\] torch.float32"),
        (lambda losses, mask: (losses, mask[:, :4]), r"got tuple \(\[8, 5\] torch.float32, \[8, 4\] torch.bool\)"),
        (lambda losses, mask: (losses[:7], mask[:7]), r"losses \[8, T\].*\[7, 5\]"),
        (lambda losses, mask: (losses[:, 0], mask[:, 0]), r"\[8\] torch.bool"),
        (lambda losses, mask: (losses, mask, mask), "got tuple"),
        (lambda losses, mask: (losses.long(), mask), "floating-point losses, got torch.int64"),
        (lambda losses, mask: (losses, mask & False), r"loader must hold at least one unmasked token"),
        (lambda losses, mask: (losses, mask | True), r"finite.*sample \d+, position \d+ has inf"),
        (lambda losses, mask: (losses, torch.rand(mask.shape) < 0.5), "mask must depend on the data only"),
        (lambda losses, mask: (losses, mask & (torch.arange(len(mask)) > 0)[:, None]), "must not depend on the other"),
    ],
    ids=["no mask", "float mask", "mask shape", "short", "1-D", "three", "integers", "empty", "inf", "random", "batch"],
)
def test_what_a_callable_returns(build: Build, model: TokenModel, change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(model, text(), loss=returning(change))


@pytest.mark.parametrize("kept", ["none but the first position", "all but the last token", "one more token"])
def test_a_mask_that_moves_with_the_weights_is_refused(build: Build, model: TokenModel, kept: str) -> None:
    """At w* it is the same at every pass; away from it, another."""
    at_star = model.head.bias.detach().clone()

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        losses, mask = callable_loss(model, batch)
        if torch.equal(model.head.bias, at_star):  # type: ignore[arg-type,union-attr]
            return losses, mask
        if kept == "one more token":
            return losses.nan_to_num(posinf=1.0), mask | (torch.arange(5) == 4)
        if "first" in kept:
            return losses, mask & (torch.arange(5) < 1)
        mask = mask.clone()
        mask[-1, -1] = False
        return losses, mask

    inputs, targets = text()
    targets[10] = 1  # the last sample counts in full
    with pytest.raises(
        ValueError, match="mask must depend on the data only, but that of loader samples 0 to 10 changed"
    ):
        build(model, (inputs, targets), loss=loss)


def test_a_mask_of_large_losses_is_refused(build: Build, model: TokenModel) -> None:
    """A natural mistake: it depends on the weights."""

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        losses, mask = callable_loss(model, batch)
        return losses, mask & (losses > 1.9)

    with pytest.raises(ValueError, match="mask must depend on the data only"):
        build(model, text(num_samples=40), loss=loss)


def test_per_token_and_per_sample_do_not_mix(build: Build, model: TokenModel) -> None:
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Any:
        losses, mask = callable_loss(model, batch)
        return (losses, mask) if mask.shape[1] == 5 else losses[:, 0]

    with pytest.raises(ValueError, match=r"one kind.*loader token, train sample"):
        build(model, text(), train=(torch.zeros(3, 1).long(), torch.zeros(3, 1).long()), loss=loss)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.zeros(11, dtype=torch.int64), r"integers of shape \[N, T\].*\[11\]"),
        (torch.zeros(11, 5), r"integers of shape \[N, T\].*float32"),
        (torch.zeros(11, 4, dtype=torch.int64), r"outputs of shape \[B, 4, C\].*\[8, 5, 7\]"),
        (torch.full((11, 5), 7), r"\[0, 7\).*-100; sample 0, position 0 has 7"),
        (torch.full((11, 5), -1), r"sample 0, position 0 has -1"),
        (torch.full((11, 5), IGNORED), "at least one unmasked token"),
    ],
    ids=["1-D", "float", "another length", "class 7", "class -1", "all ignored"],
)
def test_token_cross_entropy_wants_its_shapes(build: Build, model: TokenModel, targets: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(model, (text()[0], targets), loss="token_cross_entropy")


def test_outputs_with_logits_and_ignored_training_samples(build: Build, model: TokenModel) -> None:
    """An output object, as language models return, and all of a minibatch masked now and then."""

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Any:
            return type("Output", (), {"logits": self.inner(x)})()

    inputs, targets = text()
    targets[5:] = IGNORED
    wrapped = build(Wrapped(), (inputs, targets), loss="token_cross_entropy")
    plain = build(model, (inputs, targets), loss="token_cross_entropy")
    np.testing.assert_array_equal(wrapped.to_numpy(), plain.to_numpy())
