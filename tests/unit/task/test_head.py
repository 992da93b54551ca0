"""The head taken off: the same losses without logits, several draws in one pass, and heads that are none refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lossk
from lossk.data.data import Samples
from lossk.ops import head_loss as op
from lossk.probe.head_choice import fuse_head
from lossk.task.head import FusedHead, NoHead, agreement, find_head, heads_at_a_time
from lossk.task.losses import resolve_loss
from lossk.task.task import Task
from small_networks import head_only, vectors
from token_problems import IGNORED, TokenModel, text

Build = Callable[..., lossk.LossKernel]
FUSED = lossk.Passes(fused_head=True)
BACKENDS = ("torch", "cpp", "triton")


class Untraceable(nn.Module):
    """Control flow on values; `fc` makes what it returns."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.body, self.fc = nn.Linear(4, 6), nn.Linear(6, 3, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        if float(x.detach().abs().sum()) < 0:
            x = -x
        return self.fc(x.relu())


class TiedModel(nn.Module):
    """A language model in small whose head is its embedding, and returns an object with logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(7, 8), nn.Linear(8, 8)
        self.lm_head = nn.Linear(8, 7, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Any:
        return Output(self.lm_head(self.mix(self.embed(tokens)).tanh()))


@dataclasses.dataclass
class Output:
    logits: Tensor


class Scaled(nn.Module):
    """Its linear layer's output is changed before it is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * 0.5


class Switching(nn.Module):
    """Returns its linear layer's output; the layer is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if float(x.detach().sum()) > 1e9:
            return x
        return self.fc(self.fc(x).tanh())


def task_of(model: nn.Module, data: Any, loss: str, **options: Any) -> tuple[Task, Samples]:
    task = Task(model, resolve_loss(loss), **options)
    task.passes = FUSED
    return task, Samples(data, len(data[0]))


PROBLEMS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], str]] = {
    "traced": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), vectors, "cross_entropy"),
    "no bias": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3, bias=False)),
        vectors,
        "cross_entropy",
    ),
    "only a head": (lambda: nn.Linear(4, 3), vectors, "cross_entropy"),
    "by its output": (Untraceable, vectors, "cross_entropy"),
    "tokens": (TokenModel, text, "token_cross_entropy"),
    "tied": (TiedModel, text, "token_cross_entropy"),
}


# --- the same losses ---------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype:UserWarning")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_losses_are_those_of_the_model(name: str, backend: str) -> None:
    """At w* and away from it: weights are read where they are, so moving the flat buffer moves the head."""
    make, data, loss = PROBLEMS[name]
    task, samples = task_of(make(), data(), loss)
    task.head, (reason,) = fuse_head(task, samples, backend)
    assert task.head is not None
    assert reason.startswith("fused head = used")
    with task:
        for _ in range(2):
            plain, mask = task.loss.rows(task.model, samples[:])
            fused, same = task.rows(samples[:])
            hidden = task.head.head.body(samples[:][0])
            every, _ = task.loss.evaluate(task.model, samples[:])
            bound = agreement(hidden, task.head.head.linear, every, None).view(every.shape)
            bound = bound if mask is None else bound[mask]
            assert ((fused.double() - plain.double()).abs() <= bound).all()
            assert float(bound.amax()) < 1e-4  # which would mean nothing if it were wide
            shares = task.losses(samples[:])
            torch.testing.assert_close(shares, task.loss.per_sample(task.model, samples[:]), rtol=1e-4, atol=1e-5)
            if mask is not None:
                assert same is not None
                assert torch.equal(mask, same)
            task.flat.add_(0.3 * torch.randn_like(task.flat))


def test_half_precision_passes_agree_within_the_rounding_of_logits() -> None:
    task, samples = task_of(*[PROBLEMS["traced"][0](), vectors()], "cross_entropy", precision="bf16")
    task.head, _ = fuse_head(task, samples, "torch")
    with task:
        fused, _ = task.rows(samples[:])
        wide = torch.nn.functional.cross_entropy(task.model(samples[:][0]).double(), samples[:][1], reduction="none")
    torch.testing.assert_close(fused.double(), wide, rtol=0.1, atol=0.02)
    assert not torch.equal(fused.double(), wide)


def test_the_agreement_is_a_bound_not_a_blanket() -> None:
    """A head whose bias is off by 1e-3 is seen."""
    model, data = PROBLEMS["traced"][0](), vectors()
    task, samples = task_of(model, data, "cross_entropy")
    task.head, _ = fuse_head(task, samples, "torch")
    assert task.head is not None
    with task:
        plain, _ = task.loss.rows(task.model, samples[:])
        hidden = task.head.head.body(data[0])
        moved = nn.functional.linear(hidden, model[2].weight, model[2].bias + torch.tensor([1e-3, 0.0, 0.0]))
        off = torch.nn.functional.cross_entropy(moved, data[1], reduction="none")
        bound = agreement(hidden, model[2], plain, None)
    assert ((off.double() - plain.double()).abs() > bound).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_kernel_from_hidden_states(build: Build, problem: Any, backend: str) -> None:
    short = {"sampler": lossk.Gaussian(sigma=0.05), "num_draws": 3}
    expected = build(problem.model(), problem.data, **short)
    found = build(problem.model(), problem.data, backend=backend, passes=FUSED, **short)
    assert found.meta["passes"]["fused_head"] is True
    assert expected.meta["passes"]["fused_head"] is False
    assert any("hidden states" in reason for reason in found.meta["passes_reasons"])
    scale = float(expected.variance.max())
    np.testing.assert_allclose(found.to_numpy(), expected.to_numpy(), rtol=0, atol=5e-4 * scale)


def test_auto_is_for_triton(build: Build, problem: Any) -> None:
    short = {"sampler": lossk.Gaussian(sigma=0.05), "num_draws": 2, "num_chains": 1}
    used = {b: build(problem.model(), problem.data, backend=b, **short).meta["passes"] for b in ("cpp", "triton")}
    assert {backend: passes["fused_head"] for backend, passes in used.items()} == {"cpp": False, "triton": True}


def test_token_losses_with_a_tied_head(build: Build) -> None:
    torch.manual_seed(0)
    model, data = TiedModel(), text()
    expected = build(model, data, loss="token_cross_entropy")
    found = build(model, data, loss="token_cross_entropy", passes=FUSED)
    assert torch.equal(found.tokens, expected.tokens)
    scale = float(expected.variance.max())
    np.testing.assert_allclose(found.to_numpy(), expected.to_numpy(), rtol=0, atol=5e-4 * scale)
    assert model.lm_head.weight is model.embed.weight


def test_logits_are_never_formed_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for 40 logits, no tensor of more is given to the loss: whatever B, C and k."""
    monkeypatch.setattr(op, "CHUNK", 40)
    sizes = []
    plain = op.sample_loss

    def watched(logits: Tensor, *arguments: Any, **options: Any) -> None:
        sizes.append(logits.numel())
        plain(logits, *arguments, **options)

    monkeypatch.setattr(op, "sample_loss", watched)
    for batch, classes, heads in ((50, 7, 1), (3, 7, 9), (1, 39, 4), (2, 60, 3)):
        hidden, head = torch.randn(batch, 5), torch.randn(heads, classes, 5)
        targets, out = torch.randint(0, classes, (batch,)), torch.empty(heads, batch)
        op.head_loss(hidden, head, targets, out, backend="torch")
        logits = torch.einsum("bd,kcd->kbc", hidden.double(), head.double())
        wide = -logits.log_softmax(2).gather(2, targets.expand(heads, -1).unsqueeze(2)).squeeze(2)
        torch.testing.assert_close(out.double(), wide, rtol=1e-4, atol=1e-5)
        assert max(sizes) <= max(40, classes)
        sizes.clear()


# --- several draws in one pass -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "pattern"),
    [*((b, "3.*") for b in BACKENDS), *((b, p) for b in ("torch", "cpp") for p in ("3.weight", "3.bias"))],
)
def test_a_panel_of_heads_is_draw_by_draw(
    build: Build, monkeypatch: pytest.MonkeyPatch, backend: str, pattern: str
) -> None:
    data, sampler = vectors(), lossk.Gaussian(sigma=0.1, params=[pattern])
    options: dict[str, Any] = {"sampler": sampler, "backend": backend, "num_draws": 4, "panel": 3, "num_chains": 1}
    together = build(head_only(), data, passes=FUSED, **options)
    monkeypatch.setattr("lossk.task.head.STACK_BYTES", {"cpu": 0})
    single = build(head_only(), data, passes=FUSED, **options)
    plain = build(head_only(), data, passes=dataclasses.replace(FUSED, fused_head=False), **options)
    scale = float(plain.variance.max())
    for other in (single, plain):
        np.testing.assert_allclose(together.to_numpy(), other.to_numpy(), rtol=0, atol=5e-4 * scale)
        torch.testing.assert_close(together.mean_loss, other.mean_loss, rtol=1e-5, atol=0)


def test_hidden_states_are_computed_once_for_a_panel(build: Build) -> None:
    """Without a cached prefix the body runs once for the draws of a stack instead of once for each."""
    counts = []
    for fused in (False, True):
        model = head_only()
        passes = lossk.Passes(fused_head=fused, frozen_prefix=False)
        sampler = lossk.Gaussian(sigma=0.1, params=["3.*"])
        build(model, vectors(), passes=passes, num_draws=16, num_chains=1, panel=8, sampler=sampler)
        counts.append(model[2].tally.count)
    # Two passes instead of 16. Trying the head takes 6 passes of 8 samples, proving a pass of two draws one of all 19.
    assert counts[0] - counts[1] >= 19 * (16 - 2) - 48 - 19


def test_stacks_end_with_panels_and_resume(build: Build, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """5 draws a panel, 2 heads at a time, 7 draws: every loss is its own draw's, also after an interruption."""
    monkeypatch.setattr("lossk.task.head.STACK_BYTES", {"cpu": 2 * 4 * 21})
    assert heads_at_a_time(5, 21, torch.device("cpu")) == 2
    sampler = lossk.Gaussian(sigma=0.1, params=["3.*"])
    options: dict[str, Any] = {"sampler": sampler, "num_draws": 7, "panel": 5, "passes": FUSED}
    whole = build(head_only(), vectors(), out=tmp_path / "a.lossk", **options)
    fill, calls = lossk.probe.probe.Probe.fill, []

    def failing(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        fill(*arguments)

    monkeypatch.setattr("lossk.probe.probe.Probe.fill", failing)
    torch.manual_seed(0)
    with pytest.raises(KeyboardInterrupt):
        build(head_only(), vectors_again(), out=tmp_path / "b.lossk", **options)
    again = build(head_only(), vectors_again(), out=tmp_path / "b.lossk", resume=True, **options)
    monkeypatch.setattr("lossk.probe.probe.Probe.fill", fill)
    straight = build(head_only(), vectors_again(), **options)
    np.testing.assert_array_equal(again.to_numpy(), straight.to_numpy())
    assert whole.num_draws == 7


def vectors_again() -> tuple[Tensor, Tensor]:
    torch.manual_seed(11)
    return vectors()


def test_a_draw_that_blows_up_is_named(build: Build) -> None:
    sampler = lossk.Gaussian(sigma=1e38, params=["3.*"])
    with pytest.raises(lossk.DivergedError, match=r"probe sample \d+ has loss (inf|nan)"):
        build(head_only(), vectors(), sampler=sampler, passes=FUSED)


def test_a_tied_head_is_not_taken_for_one_alone() -> None:
    """Its weights are the embedding's: hidden states move with every draw."""
    task, samples = task_of(TiedModel(), text(), "token_cross_entropy")
    task.head, _ = fuse_head(task, samples, "torch")
    assert task.head is not None
    assert not task.head.head.alone
    assert task.draws_at_a_time(9) == 1
    task, samples = task_of(head_only(), vectors(), "cross_entropy", params=["3.*"])
    task.head, _ = fuse_head(task, samples, "torch")
    assert task.draws_at_a_time(9) == 9
    task, samples = task_of(head_only(), vectors(), "cross_entropy")
    task.head, _ = fuse_head(task, samples, "torch")
    assert task.draws_at_a_time(9) == 1  # all weights are sampled


# --- what is no head ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Scaled, "does not come from a plain linear layer"),
        (Switching, "no linear layer is called once"),
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.Softplus()), "plain linear layer"),
        (lambda: nn.Sequential(nn.Conv1d(1, 1, 1), nn.Flatten(0)), "plain linear layer"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), "plain linear layer"),
    ],
)
def test_what_is_no_head_is_refused(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(NoHead, match=message):
        find_head(make().eval(), torch.randn(3, 1, 4) if "Conv" in repr(make()) else torch.randn(3, 4))


def test_asked_for_it_must_be_possible(build: Build, problem: Any) -> None:
    model = nn.Sequential(problem.model(), nn.Softplus())
    with pytest.raises(ValueError, match="fused_head=True: what the model returns does not come from a plain linear"):
        build(model, problem.data, passes=FUSED)
    with pytest.raises(ValueError, match="fused_head=True: the loss is not one of cross_entropy"):
        build(Scaled(), (problem.inputs, problem.inputs[:, :3]), loss="mse", passes=FUSED)
    short = {"sampler": lossk.Gaussian(sigma=0.05), "num_draws": 2, "num_chains": 1}
    told = build(model, problem.data, backend="triton", **short).meta
    assert told["passes"]["fused_head"] is False
    assert any(reason.startswith("fused head = not used: what the model") for reason in told["passes_reasons"])


def test_a_disagreeing_head_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = FusedHead._losses

    def wrong(self: FusedHead, *arguments: Any) -> Any:
        found, mask = losses(self, *arguments)
        return found.index_fill(0, torch.tensor([2]), float("nan")), mask

    monkeypatch.setattr(FusedHead, "_losses", wrong)
    task, samples = task_of(head_only(), vectors(), "cross_entropy")
    with pytest.raises(ValueError, match="differ by inf nats more than rounding explains"):
        fuse_head(task, samples, "torch")


def test_ignored_tokens_cost_nothing_and_count_nothing() -> None:
    assert IGNORED == -100
    task, samples = task_of(TiedModel(), text(), "token_cross_entropy")
    task.head, _ = fuse_head(task, samples, "torch")
    with task:
        losses, mask = task.head.evaluator()(samples[:])  # type: ignore[union-attr]
    assert mask is not None
    assert (losses[~mask] == 0).all()
