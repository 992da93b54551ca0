"""How the passes are run: the same numbers whatever the settings, and a pilot that chooses by what it measures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lossk
from lossk.data.data import Samples
from lossk.pilot import passes_pilot
from lossk.pilot.passes_pilot import Load, choose_passes
from lossk.task.losses import resolve_loss
from lossk.task.task import Task
from small_networks import Tally

Build = Callable[..., lossk.LossKernel]


class Watched(nn.Module):
    """A linear classifier that notes the size, layout and grad mode of every batch it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.tally = Tally()  # (samples, whether gradients are on)

    def forward(self, x: Tensor) -> Tensor:
        self.tally.seen.append((len(x), torch.is_grad_enabled()))
        return self.linear(x)


def conv_problem(num_samples: int = 9) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    model = nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 16, 3))
    return model, (torch.randn(num_samples, 2, 6, 6), torch.arange(num_samples) % 3)


# --- what they change, and what not ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{"probe_batch": 1}, {"probe_batch": 5}, {"gradient_batch": 1}, {"gradient_batch": 3}]
)
def test_batch_sizes_change_rounding_only(build: Build, problem: Any, changes: dict[str, int]) -> None:
    expected = build(problem.model(), problem.data).to_numpy()
    found = build(problem.model(), problem.data, passes=lossk.Passes(**changes)).to_numpy()
    # The sums of a float32 pass differ by some units in the last place; K holds squares of losses' deviations.
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4 * np.abs(expected).max())


def test_batch_sizes_are_those_asked_for(build: Build, problem: Any) -> None:
    model = Watched()
    kernel = build(model, problem.data, passes=lossk.Passes(probe_batch=7, gradient_batch=3))
    num_samples = len(problem.data[0])
    backward = {size for size, grad in model.tally.seen if grad}
    forward = {size for size, grad in model.tally.seen if not grad}
    assert max(size for size in backward if size <= 4) <= 3  # the minibatch is 4 samples
    assert {7, num_samples % 7 or 7} <= forward
    assert (
        kernel.meta["passes"]
        == lossk.Passes(probe_batch=7, gradient_batch=3, fused_head=False, overlap=False).to_dict()
    )


def test_both_memory_formats_give_the_losses_and_gradients_of_the_model() -> None:
    model, data = conv_problem()
    expected = nn.functional.cross_entropy(model(data[0]), data[1], reduction="none")
    parameters = list(model.parameters())
    slope = torch.autograd.grad(expected.mean(), parameters)
    for memory_format in ("channels_last", "contiguous"):
        task = Task(model, resolve_loss("cross_entropy"))
        task.passes = lossk.Passes(memory_format=memory_format)
        with task:
            assert task.channels_last == (memory_format == "channels_last")
            placed = task.place(Samples(data, 9))
            assert placed.tree[0].is_contiguous(memory_format=torch.channels_last) == task.channels_last
            torch.testing.assert_close(task.losses(placed[:]), expected.detach())
            task.gradient(placed, torch.arange(9))
            torch.testing.assert_close(task.grad, task.flatten(slope))


def test_probe_and_training_data_lie_as_chosen(build: Build) -> None:
    model, data = conv_problem()
    kernels = [
        build(model, data, train=train, passes=lossk.Passes(memory_format="contiguous")).to_numpy()
        for train in (None, tuple(part.clone() for part in data))
    ]
    np.testing.assert_array_equal(*kernels)


def test_threads_are_given_back(build: Build, problem: Any) -> None:
    before, seen = torch.get_num_threads(), []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        seen.append(torch.get_num_threads())
        if len(seen) == 40:
            raise KeyboardInterrupt
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    with pytest.raises(KeyboardInterrupt):
        build(problem.model(), problem.data, loss=loss, passes=lossk.Passes(num_threads=before + 1))
    assert seen[-1] == before + 1
    assert torch.get_num_threads() == before


def test_a_resumed_run_keeps_its_passes(build: Build, problem: Any, tmp_path: Path) -> None:
    count, stop = 0, 10**9

    def loss(model: nn.Module, batch: Any) -> Tensor:
        nonlocal count
        count += 1
        if count == stop:
            raise KeyboardInterrupt
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    asked: dict[str, Any] = {"loss": loss, "panel": 1}
    build(problem.model(), problem.data, passes=lossk.Passes(probe_batch=3), **asked)
    count, stop = 0, count - 5
    asked["out"] = tmp_path / "k.lossk"
    with pytest.raises(KeyboardInterrupt):
        build(problem.model(), problem.data, passes=lossk.Passes(probe_batch=3), **asked)
    with pytest.raises(ValueError, match=r"passes must be those of the run.*probe_batch=3"):
        build(problem.model(), problem.data, passes=lossk.Passes(probe_batch=4), resume=True, **asked)
    kernel = build(problem.model(), problem.data, resume=True, **asked)
    assert kernel.meta["passes"]["probe_batch"] == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"probe_batch": 0}, "probe_batch must be at least 1, got 0"),
        ({"gradient_batch": 2.5}, "gradient_batch must be an integer, got 2.5"),
        ({"memory_format": "nchw"}, "memory_format must be one of"),
        ({"num_threads": 0}, "num_threads must be at least 1, got 0"),
        ({"compile": "yes"}, "compile must be one of"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        lossk.Passes(**settings)


def test_passes_must_be_passes(build: Build, problem: Any) -> None:
    with pytest.raises(TypeError, match=r"passes must be a lossk.Passes or None, got dict"):
        build(problem.model(), problem.data, passes={"probe_batch": 3})


# --- the pilot ---------------------------------------------------------------------------------------------------

PER_SAMPLE = 1e-3  # seconds, of the default


def choose(
    monkeypatch: pytest.MonkeyPatch, cost: Callable[[lossk.Passes], float], *, draws: int = 1000, steps: int = 0
) -> tuple[lossk.Passes, str, list[lossk.Passes]]:
    """The pilot on a small convolutional model, whose passes take `cost` times PER_SAMPLE seconds per sample."""
    model, data = conv_problem(600)
    task, tried = Task(model, resolve_loss("cross_entropy")), []

    def measure(bench: Any, passes: lossk.Passes, part: int | None = None, *_: Any, once: bool = False) -> Any:
        tried.append(passes)
        seconds = PER_SAMPLE * cost(passes)
        return (0.0 if part == 1 else seconds), (0.0 if part == 0 else seconds)

    monkeypatch.setattr(passes_pilot._Bench, "measure", measure)
    samples = Samples(data, 600)
    found, (reason, *_) = choose_passes(task, samples, samples, Load(draws, steps, 128))
    assert task.passes == lossk.Passes()
    return found, reason, tried


def test_a_short_run_measures_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    found, reason, tried = choose(monkeypatch, lambda passes: 1.0, draws=3)
    assert found == lossk.Passes()
    assert len(tried) == 1
    assert "too few for measuring to pay" in reason


def test_the_quickest_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = lossk.Passes(memory_format="contiguous", probe_batch=64, gradient_batch=32)

    def cost(passes: lossk.Passes) -> float:
        same = sum(
            getattr(passes, name) == getattr(quick, name) for name in ("memory_format", "probe_batch", "gradient_batch")
        )
        return 1.0 - 0.2 * same

    found, reason, _ = choose(monkeypatch, cost, steps=3000)
    assert found == quick
    assert "times as fast as the default" in reason


def test_a_gain_within_the_noise_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found, reason, _ = choose(monkeypatch, lambda passes: 1.0 if passes == lossk.Passes() else 0.97)
    assert found == lossk.Passes()
    assert "nothing else measured was clearly quicker" in reason


def test_a_lucky_moment_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One quick measurement of a candidate, or one slow one of the default, does not choose."""
    counts: dict[lossk.Passes, int] = {}

    def cost(passes: lossk.Passes) -> float:
        counts[passes] = counts.get(passes, 0) + 1
        return 3.0 if passes == lossk.Passes() and counts[passes] == 2 else 1.0  # after a rough look at the default

    found, _, _ = choose(monkeypatch, cost)
    assert found == lossk.Passes()


def test_what_would_take_longer_to_measure_than_it_may_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """3 % of 6 s, 0.18 s: a pass of 32 samples fits in it four times, one of 256 does not."""
    found, _, tried = choose(monkeypatch, lambda passes: 0.5 if passes.probe_batch in (32, 512) else 1.0, draws=10)
    assert found.probe_batch == 32
    assert {passes.probe_batch for passes in tried} == {256, 32}


def test_a_hopeless_candidate_is_measured_once() -> None:
    calls: list[None] = []
    for hopeless, expected in ((0.0, 2), (1e9, 1 + passes_pilot.REPEATS)):
        calls.clear()
        passes_pilot.quickest(lambda: calls.append(None), hopeless, torch.device("cpu"))
        assert len(calls) == expected


def test_threads_are_tried_where_there_are_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    found, _, _ = choose(monkeypatch, lambda passes: 0.1 if passes.num_threads == 1 else 1.0)
    assert found.num_threads == 1


def test_a_model_that_does_not_compile_runs_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def cost(passes: lossk.Passes) -> float:
        if passes.compile:
            raise RuntimeError("no compiler here")
        return 1.0

    found, _, tried = choose(monkeypatch, cost, draws=10_000)
    assert not found.compile
    assert any(passes.compile for passes in tried)
    found, _, _ = choose(monkeypatch, lambda passes: 0.5 if passes.compile else 1.0, draws=10_000)
    assert found.compile


def test_the_pilot_measures_real_passes(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing replaced but the bar below which measuring does not pay: the model comes back, the choice is kept."""
    monkeypatch.setattr(passes_pilot, "WORTH", 0.0)
    model, data = conv_problem(70)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kernel = build(model, data)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    again = build(model, data, passes=lossk.Passes(**kernel.meta["passes"]))
    np.testing.assert_array_equal(kernel.to_numpy(), again.to_numpy())
    assert kernel.meta["passes_reasons"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch itself, while it loads its compiler
def test_a_compiled_model_gives_the_same_kernel(build: Build, problem: Any) -> None:
    expected = build(problem.model(), problem.data).to_numpy()
    found = build(problem.model(), problem.data, passes=lossk.Passes(compile=True)).to_numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4 * np.abs(expected).max())


def test_the_plain_form_gives_the_settings_back() -> None:
    passes = lossk.Passes(probe_batch=3, num_threads=2)
    assert lossk.Passes(**passes.to_dict()) == passes
    assert dataclasses.replace(passes, compile=True) != passes
