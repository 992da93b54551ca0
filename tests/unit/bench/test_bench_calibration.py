"""The calibration's truths against each other, and each of its sections at the smallest size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from bench import calibration
from bench.calibration_problems import curvature, network, problem
from bench.calibration_runs import wrong
from bench.calibration_truth import hmc_truth, linear_truth, product_truth, singular_truth
from bench.calibration_verdicts import mistaken


def test_hmc_draws_the_law_that_is_known_in_closed_form() -> None:
    of = problem("small linear")
    exact = linear_truth(of, of.n_beta, 8.0)
    drawn = hmc_truth(of, of.n_beta, 8.0, chains=32, draws=60)
    assert abs(drawn.trace - exact.trace) < 4 * drawn.trace_se < 0.15 * exact.trace
    assert abs(drawn.llc - exact.llc) < 4 * drawn.llc_se < 0.15 * exact.llc
    assert np.allclose(drawn.block, exact.block, atol=0.15 * np.abs(exact.block).max())
    assert drawn.rhat < 1.1


@pytest.mark.parametrize("gamma", [1.0, 8.0])
def test_quadrature_gives_the_singular_model_of_t7(gamma: float) -> None:
    of = problem("singular")
    found = product_truth(of, of.n_beta, gamma)
    assert np.allclose((found.trace, found.llc), singular_truth(of, of.n_beta, gamma), rtol=1e-4)


@pytest.mark.parametrize("name", ["singular", "saddle"])
def test_quadrature_agrees_with_hmc(name: str) -> None:
    of = problem(name)
    exact, drawn = product_truth(of, of.n_beta, 8.0), hmc_truth(of, of.n_beta, 8.0, chains=32, draws=80)
    assert abs(drawn.llc - exact.llc) < 5 * drawn.llc_se + 0.02 * abs(exact.llc)
    assert abs(drawn.trace - exact.trace) < 5 * drawn.trace_se


@pytest.mark.parametrize("name", ["tiny MLP", "logistic", "small softmax", "40 blocks", "untrained", "saddle"])
def test_the_losses_written_out_here_are_those_of_the_model(name: str) -> None:
    of = network(name, "mse", (2, 3, 1), 20, iterations=5) if name == "tiny MLP" else problem(name)
    out, y = of.model(of.data[0]), of.data[1]
    if isinstance(of.loss, torch.nn.Module):
        losses = torch.nn.functional.binary_cross_entropy_with_logits(out, y, reduction="none")[:, 0]
    elif of.loss == "mse":
        losses = (out - y).square()[:, 0]
    else:
        losses = torch.nn.functional.cross_entropy(out, y, reduction="none")
    assert torch.allclose(losses.double(), of.losses(of.w_star.unsqueeze(0))[0], rtol=1e-4, atol=1e-5)


def test_w_star_is_a_minimum_where_it_is_said_to_be() -> None:
    for name in ("linear", "logistic", "softmax", "memorised"):
        of = problem(name)
        assert of.minimum
        assert curvature(of)[0] > -1e-3 * curvature(of)[-1], name
    assert curvature(problem("saddle"))[0] < -0.5


def test_what_counts_as_wrong() -> None:
    right = {"verdict": "good", "may_be_good": "if right", "trace": 1.0, "trace_se": 0.1, "true_trace": 1.35,
             "true_trace_se": 0.0, "llc": 2.0, "llc_se": None, "true_llc": 2.0, "true_llc_se": 0.0,
             "likeness": 0.9}  # fmt: skip
    assert not wrong(right)
    assert wrong(right | {"true_trace": 1.6}) == ["trace K"]
    assert wrong(right | {"llc": 2.3}) == ["LLC"]
    assert wrong(right | {"llc": np.nan, "likeness": np.nan}) == ["LLC", "R"]
    assert not mistaken(right | {"wrong": []})
    assert mistaken(right | {"wrong": ["R"]})
    assert mistaken(right | {"wrong": [], "may_be_good": "never"})
    assert not mistaken(right | {"wrong": ["R"], "verdict": "too few draws"})


def test_sections_at_the_smallest_size(tmp_path: Path) -> None:
    words = ["--small", "--only", "bias", "verdicts", "law", "--seeds", "1", "--results", str(tmp_path / "results")]
    calibration.main([*words, "--out", str(tmp_path / "page.md")])
    page = (tmp_path / "page.md").read_text()
    for title in ("## Bias", "## Verdicts", "## The law over seeds"):
        assert title in page
    for section in ("bias", "verdicts", "law"):
        assert json.loads((tmp_path / "results" / f"{section}.json").read_text())["rows"]


def test_parts_that_stand_elsewhere_have_their_section(tmp_path: Path) -> None:
    rows = [{"losses": "z", "draws": "4 x 200", "way": way, "floor": 1.0} for way in ("formula", "rows", "watched")]
    record = {"section": "floors", "seeds": 1, "rows": rows, "seconds": 1.0}
    environment = {"device": "a processor", "threads": 1, "load_average": 0.0, "git_sha": "abc"}
    (tmp_path / "floors.json").write_text(json.dumps({**record, "environment": environment}))
    page = calibration.page(tmp_path)
    assert "## Noise floors" in page
    assert "1.00" in page
