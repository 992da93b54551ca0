"""The studies `multitask` and `imagenet`: what they measure on planted traces and tiny networks. No times."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bench.markdown import replace_between
from bench.studies import imagenet, multitask
from bench.studies.multitask import MARKS, Case, measure

import lossk
from lossk.recipes.photos import find_photos


def planted(share: float) -> tuple[lossk.LossTraces, torch.Tensor]:
    """Losses of 24 samples of two tasks: `share` of each one's variance is its task's, the rest its own."""
    tasks = torch.arange(24) % 2
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(4, 400, 2, generator=generator)[..., tasks]
    own = torch.randn(4, 400, 24, generator=generator)
    return lossk.LossTraces(share**0.5 * common + (1 - share) ** 0.5 * own), tasks


def test_planted_tasks_are_measured() -> None:
    traces, tasks = planted(0.5)
    found = measure(traces, tasks)
    assert found["purity"] == 1.0
    assert found["chance"] == pytest.approx(11 / 23)
    assert found["R within"] == pytest.approx(0.5, abs=5 * found["R within se"])
    assert found["R across"] == pytest.approx(0.0, abs=5 * found["R across se"])
    assert found["gap"] / found["gap se"] > 10
    assert found["|R| across"] > found["null |R|"] * 0.8
    assert found["above floor"] > 0.99


def test_unrelated_losses_show_chance() -> None:
    traces, tasks = planted(0.0)
    found = measure(traces, tasks)
    assert found["purity"] == pytest.approx(found["chance"], abs=0.15)
    assert abs(found["gap"]) < 4 * found["gap se"]
    assert found["|R| across"] == pytest.approx(found["null |R|"], rel=0.15)
    assert found["across beyond 1.96 se"] == pytest.approx(0.05, abs=0.04)


def test_constant_losses_correlate_with_nothing() -> None:
    losses = torch.randn(2, 9, 4)
    losses[..., 0] = 1.0
    found = multitask._correlation(losses[0])
    assert torch.equal(found[0], torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(found[1:, 1:], torch.corrcoef(losses[0, :, 1:].T.double()))


def test_a_case_is_run_once_and_the_page_holds_its_numbers(tmp_path: Path) -> None:
    small = {"p": 5, "hidden": 16, "epochs": 30, "required_accuracy": 0.0}
    case = Case("tiny", small, lossk.Gaussian(sigma=1e-3), num_draws=20)
    found = multitask.run(case, tmp_path)
    assert found["samples"] == 50
    assert multitask.run(Case("tiny", {**small, "p": 7}, lossk.Gaussian(sigma=1e-3)), tmp_path) == found  # kept
    shots = multitask.snapshots(tmp_path, at=(0, 3), p=5, hidden=8, num_draws=20)
    assert [one["epoch"] for one in shots] == [0, 3]
    limits = multitask.exact(tmp_path, [("tiny", small)])
    page = multitask.page([{**found, "name": "tiny, local"}], shots, limits)
    assert f"| tiny, local | {found['accuracy']:.1%} | {found['purity']:.3f} ({found['chance']:.2f}) |" in page
    text = f"before\n{MARKS[0]}\nold\n{MARKS[1]}\nafter\n"
    once = replace_between(text, MARKS, page)
    assert once.startswith(f"before\n{MARKS[0]}\n\n| network")
    assert replace_between(once, MARKS, page) == once


def test_near_w_star_the_kernel_is_gradient_similarity(tmp_path: Path) -> None:
    task = multitask.multitask.make_task(p=5, hidden=16, epochs=30, required_accuracy=0.0)
    sampler = lossk.Gaussian(sigma=1e-5, params=["pairs.*", "head.*"])
    traces = lossk.sample_losses(task.model, task.samples, sampler=sampler, num_draws=400, progress=False)
    assert task.labels is not None
    expected = multitask.gradient_purity(task, ("pairs.*", "head.*"))
    assert measure(traces, task.labels)["purity"] == pytest.approx(expected, abs=0.05)


def test_generated_pictures_have_imagenets_layout(tmp_path: Path) -> None:
    imagenet.generate(tmp_path, classes=3, each=2)
    found = find_photos(tmp_path)
    assert found.labels.tolist() == [0, 0, 500, 500, 999, 999]
    assert len({found.read(i) for i in range(6)}) == 6


def test_the_table_of_costs_is_proportional_to_the_photos() -> None:
    seconds = {"decode, check accuracy": 0.03, "check accuracy alone": 0.02, "gradient": 0.06}
    rows = imagenet.costs({"classes": 100, "seconds": seconds}).splitlines()
    assert "| 50,000 | 8.3 min | 7.53 GB | 111.1 h | 17.1 h | 16.7 min |" in rows[-1]
