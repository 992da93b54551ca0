"""What preparation may cost: a share of the run's own passes, degraded in a stated order, the same on every machine."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import lossk
from lossk.curvature.curvature import DRAWN_ITERATIONS, DRAWN_SAMPLES, ITERATIONS, MOST_SAMPLES
from lossk.pilot import effort
from lossk.pilot.effort import FULL, TRIALS, Effort, operations
from lossk.task.losses import resolve_loss
from lossk.task.task import Task
from lossk.timings import Progress, Timings


def test_an_effort_that_nobody_counts_is_whole() -> None:
    found = Effort()
    assert found.at_w_star(10_000) == {"most": MOST_SAMPLES, "iterations": ITERATIONS, "held_out": False}
    assert found.trial() == FULL
    assert FULL.sample == {"most": DRAWN_SAMPLES, "iterations": DRAWN_ITERATIONS}
    assert found.steps(1e9, 4000) == 4000
    assert not found.rough


@pytest.mark.parametrize("automatic", [True, False])
@pytest.mark.parametrize("passes", [10.0, 300.0, 2e3, 1e4, 1e5, 3e5, 1e7])
def test_no_more_is_spent_than_there_is(passes: float, automatic: bool) -> None:
    """But for the least measurement at w*, which is always made: 8 samples, 2 iterations."""
    found = Effort(passes, automatic=automatic)
    found.at_w_star(10_000)
    least = (1 if automatic else 2) * 8 * 2 * 11
    assert found.passes - found.left <= max(passes, least)
    while (size := found.trial()) is not None and found.steps(10.0, 4000) > 40:
        assert size in TRIALS
        found.spend(10.0 * found.steps(10.0, 4000))
        assert found.left >= 0
        if passes >= 1e7:
            break


def test_less_effort_means_fewer_samples_then_fewer_iterations() -> None:
    sizes = [Effort(passes).at_w_star(10_000) for passes in (1e6, 2e5, 1e5, 3e4, 1e4, 3e3, 1e3)]
    assert [each["most"] for each in sizes] == sorted((each["most"] for each in sizes), reverse=True)
    assert [each["iterations"] for each in sizes] == sorted((each["iterations"] for each in sizes), reverse=True)
    assert len({each["most"] for each in sizes}) > 4
    costs = [size.passes for size in TRIALS]
    assert costs == sorted(costs, reverse=True)


def test_few_training_samples_are_cheap() -> None:
    found = Effort(1e5)
    assert found.at_w_star(20)["iterations"] == ITERATIONS
    assert not found.rough


class Counted(nn.Module):
    """A classifier that counts the samples passed through it."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.seen = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += len(x)
        return self.inside(x)


def data(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 6, generator=generator), torch.randint(0, 3, (count,), generator=generator)


def prepared_passes(monkeypatch: pytest.MonkeyPatch, sampler: Any, **settings: Any) -> tuple[int, lossk.LossTraces]:
    """Samples passed through the model by all that chooses settings."""
    from lossk.run import run as module

    model, seen, usual = Counted(), [], module.choose

    def choose(*args: Any, **rest: Any) -> Any:
        before = model.seen
        found = usual(*args, **rest)
        seen.append(model.seen - before)
        return found

    monkeypatch.setattr(module, "choose", choose)
    traces = lossk.sample_losses(
        model, data(300), sampler=sampler, progress=False, passes=lossk.Passes(frozen_prefix=False), **settings
    )
    return seen[0], traces


@pytest.mark.parametrize(("draws", "share"), [(40, None), (200, None), (40, 0.05)])
def test_an_automatic_run_prepares_within_its_share(
    monkeypatch: pytest.MonkeyPatch, draws: int, share: float | None
) -> None:
    monkeypatch.setattr(effort, "FLOOR", 0.0)
    seen, traces = prepared_passes(monkeypatch, lossk.SGLD(pilot_budget=share), num_chains=2, num_draws=draws)
    own = 2 * draws * 300 + 3 * 8 * 2 * draws * 256
    # Samples passed forward are at most what passes are counted by: a gradient counts for three. What is not counted is
    # the pass that counts operations and the test of how far draws may go, of 256 samples a quarter at most 40 times.
    assert seen <= (share or 0.25) * own + 4 + 256 * 41
    assert seen > 0
    rough = [why for why in traces.meta["reasons"] if why.startswith("pilot = rough")]
    assert len(rough) == 1


def test_a_small_network_prepares_as_if_nobody_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The floor pays for everything where a pass costs little."""
    seen, traces = prepared_passes(monkeypatch, lossk.SGLD(), num_chains=2, num_draws=10)
    assert seen > 20_000
    assert not any("rough" in why for why in traces.meta["reasons"])


def test_numbers_prepare_within_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effort, "FLOOR", 0.0)
    sampler = lossk.SGLD(lr=1e-4, localization=10.0, num_burnin_steps=5, num_steps_bw_draws=2, batch_size=32)
    seen, traces = prepared_passes(monkeypatch, sampler, num_chains=2, num_draws=60)
    own = 2 * 60 * 300 + 3 * 2 * (5 + 120) * 32
    assert seen <= max(0.03 * own, 2 * 8 * 2 * 11) + 4
    assert not any("rough" in why for why in traces.meta["reasons"])


def test_operations_are_those_of_the_layers() -> None:
    x, y = data(10)
    model = nn.Sequential(nn.Linear(6, 16, bias=False), nn.Tanh(), nn.Linear(16, 3, bias=False))
    task = Task(model, resolve_loss("cross_entropy"))
    from lossk.data.probe_sets import read_sources

    _, train = read_sources((x, y), None)
    with task:
        assert operations(task, train) == 2 * (6 * 16 + 16 * 3)


def test_operations_of_an_encoder_that_torch_fuses_are_counted() -> None:
    width, length = 16, 5
    layer = nn.TransformerEncoderLayer(width, 2, 4 * width, batch_first=True, dropout=0.0)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(width * length, 3))
    task = Task(model, resolve_loss("cross_entropy"))
    from lossk.data.probe_sets import read_sources

    _, train = read_sources((torch.randn(8, length, width), torch.randint(0, 3, (8,))), None)
    fused = torch.backends.mha.get_fastpath_enabled()
    with task:
        assert operations(task, train) >= 2 * length * (4 + 8) * width**2
    assert torch.backends.mha.get_fastpath_enabled() == fused


@pytest.mark.parametrize("wrong", [0, -1.0, math.nan, "auto", True])
def test_a_budget_is_a_number_above_0(wrong: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="pilot_budget"):
        lossk.SGLD(pilot_budget=wrong)


def test_settings_without_a_budget_are_written_as_before() -> None:
    assert "pilot_budget" not in lossk.SGLD().to_dict()
    assert lossk.SGLD(pilot_budget=0.5).to_dict()["pilot_budget"] == 0.5


def test_a_long_stage_says_what_it_does(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setattr("lossk.timings.PATIENCE", 0.02)
    timings = Timings(Progress(True))
    with timings.measure("pilot"):
        time.sleep(0.2)
    with timings.measure("gradient"):
        time.sleep(0.1)
    said = capsys.readouterr().err
    assert "measuring how passes and steps are best made" in said
    assert said.count("\n") == 1
