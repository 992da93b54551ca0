"""The benchmarks of `python -m bench`, tiny: that they run, count what they say and write a page. No times."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import __main__ as whole
from bench import end_to_end, floor, growth, jobs, language, memory, one_build, options, plain
from bench.language_model import LanguageModel, Shape, sequences
from bench.memory_watch import MemoryWatch
from bench.options import Options
from bench.peers import Peer, PeerError
from bench.turns import quantiles, ratio, take_turns
from torch import nn

TINY = Options(size="tiny", threads=1)
IN_ORDER = floor.Passes(channels_last=False, batch=10, threads=1)


@pytest.fixture(scope="module")
def job() -> jobs.Job:
    return jobs.make_mlp(TINY)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds in this process: a new one takes seconds to import torch."""
    for module in (growth, memory):
        monkeypatch.setattr(module, "elsewhere", one_build.build)


# -- parts ------------------------------------------------------------------------------------------------------------


def test_all_parts_make_a_page(here: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(options, "read", lambda arguments: TINY)
    page, record = tmp_path / "docs" / "bench.md", tmp_path / "bench.json"
    whole.main(["--out", str(page), "--record", str(record)])
    found = json.loads(record.read_text())
    assert set(whole.PARTS) <= set(found)
    assert found["command"] == "python -m bench --out bench.md --record bench.json"
    text = page.read_text()
    assert text == whole.page(found)  # the record is all the page is made of
    assert text.count("\n## ") == len(whole.PARTS)
    assert "nan" not in text
    assert "A quick run" in text
    for result in (*found["end_to_end"].values(), found["language"]):
        turns = result["turns"]
        assert list(turns) == [getattr(end_to_end, name) for name in ("OURS", "ONCE", "FLOOR", "PLAIN", "TUNED")]
        assert result["seconds"].keys() == turns.keys()


def test_a_build_elsewhere() -> None:
    found = one_build.elsewhere(one_build.Point(num_samples=50, num_draws=2))
    assert found["peak"] == found["before"] + found["above"]
    assert found["timings"]["total"] > 0
    with pytest.raises(RuntimeError, match="num_draws must be at least 2, got 1"):
        one_build.elsewhere(one_build.Point(num_samples=50, num_draws=1))


def test_a_kernel_that_would_not_fit_is_left_out(here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "HEADROOM", 0.0)
    assert "left out: too little memory" in growth.section(growth.measure(TINY))


def test_peers_are_given_the_job(monkeypatch: pytest.MonkeyPatch, job: jobs.Job) -> None:
    """With a peer that answers at once."""
    specs: list[dict[str, Any]] = []

    class Quick(Peer):
        versions = {"devinterp": "9"}  # noqa: RUF012

        def __enter__(self) -> Peer:
            specs.append(self.spec)
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def turn(self) -> dict[str, float]:
            return {"seconds": 1e9, "mean_loss": 0.5, "mean_variance": 0.25}

    for module in (end_to_end, language, memory):
        monkeypatch.setattr(module, "Peer", Quick)
    both = replace(TINY, peer1_python="python1", peer2_python="python2", networks=["mlp"])
    text = end_to_end.section(end_to_end.measure(both)) + language.section(language.measure(both))
    assert "| devinterp 1.3.2 | 1e+09 s (1e+09 s to 1e+09 s) | " in text
    assert " | at least 1.5 | 0.5 | 0.25 |" in text
    assert text.count(" | at least 2 | 0.5 | 0.25 |") == 2
    wanted = {"num_draws": 4, "num_chains": 4, "num_steps_bw_draws": 1, "threads": 1, "n_beta": 64 / math.log(64)}
    assert wanted.items() <= specs[0].items()
    assert [spec.get("kernel") for spec in specs] == [None, "torch.cov", "token"]


def test_a_peer_that_cannot_start_says_why() -> None:
    with (
        pytest.raises(PeerError, match=r"bench\.nothing ended without a result:\n.*No module named"),
        Peer(sys.executable, "bench.nothing", {}),
    ):
        pass


def test_what_a_further_draw_costs() -> None:
    """A call of 7 s and 0.3 s for each of 100 draws, over a floor of 0.25 s a draw."""
    turns = {
        end_to_end.OURS: [{"seconds": 37.0}],
        end_to_end.ONCE: [{"seconds": 7.6}],
        end_to_end.FLOOR: [{"seconds": 25.0}],
    }
    text = end_to_end.further({"turns": turns, "job": {"num_chains": 4, "num_draws": 25}})
    assert "with two draws in all takes 7.6 s" in text
    assert "A further draw takes 1.2 (1.2 to 1.2) times the floor's." in text


# -- contenders -------------------------------------------------------------------------------------------------------


def test_the_floors_passes_are_the_jobs(job: jobs.Job) -> None:
    """All N losses; and the mean gradient of a minibatch, whatever it is cut into."""
    seen: list[int] = []
    counted = replace(job, batch_size=16, model=deepcopy(job.model))
    counted.model.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    floor.forward_pass(counted, IN_ORDER)()
    assert sum(seen) == 64
    assert max(seen) == 10
    model = nn.Linear(64, 10)
    run = floor.backward_pass(replace(counted, model=model), replace(IN_ORDER, batch=6))
    captured: list[nn.Module] = []
    original = floor.mean_loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(floor, "mean_loss", lambda copy, x, y: captured.append(copy) or original(copy, x, y))
        run()
    assert len(captured) == 3
    original(model, job.train[0][:16], job.train[1][:16]).backward()
    assert captured[0].weight.grad is not None
    torch.testing.assert_close(captured[0].weight.grad, model.weight.grad)


def test_the_search_takes_the_fastest(monkeypatch: pytest.MonkeyPatch, job: jobs.Job) -> None:
    monkeypatch.setattr(floor, "_time", lambda run, clock: run() or 0.0)
    slow = {32: 3.0, 64: 1.0, 100: 2.0}
    candidates = [floor.Passes(False, batch, 1) for batch in slow]
    best, seen = floor.fastest(lambda job, passes: lambda: slow[passes.batch], job, candidates)
    assert best.batch == 64
    assert [each["ms"] for each in seen] == [3000.0, 1000.0, 2000.0]


def test_plain_torch_makes_the_step_it_should(job: jobs.Job) -> None:
    w, anchor, grad = torch.randn(1000), torch.randn(1000), torch.randn(1000)
    parameter = nn.Parameter(w.clone())
    parameter.grad = grad.clone()
    torch.manual_seed(3)
    plain.step([parameter], [anchor], job)
    torch.manual_seed(3)
    drift = job.n_beta * grad + job.localization * (w - anchor)
    expected = w - job.lr / 2 * drift + math.sqrt(job.lr) * torch.randn(1000)
    torch.testing.assert_close(parameter.detach(), expected)


def test_ours_and_plain_torch_sample_alike(job: jobs.Job) -> None:
    """A law that mixes fast: a wrong lr, n_beta or localization would show in the variance, and in the loss's rise."""
    longer = replace(job, lr=1e-3, localization=1000.0, num_chains=2, num_draws=300, batch_size=64)
    ours, theirs = end_to_end.ours(longer)(), plain.contender(longer, IN_ORDER, IN_ORDER)()
    start = float(jobs.mean_loss(job.model, *job.train).detach())
    assert ours["mean_loss"] - start == pytest.approx(theirs["mean_loss"] - start, rel=0.1)
    assert ours["mean_variance"] == pytest.approx(theirs["mean_variance"], rel=0.1)


def test_the_language_model_is_causal() -> None:
    shape = Shape(vocabulary=16, context=6, width=8, heads=2)
    model, ids = LanguageModel(shape).eval(), sequences(3, shape)
    assert ids.shape == (3, 7)
    assert torch.equal(ids, sequences(3, shape))
    changed = ids.clone()
    changed[:, 4:] = (changed[:, 4:] + 1) % 16
    before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert (before[:, 4] - after[:, 4]).abs().amax() > 0


# -- counting, and the command line -----------------------------------------------------------------------------------


def test_turns_and_ratios() -> None:
    order: list[str] = []

    def contender(name: str, seconds: float) -> Any:
        return lambda: order.append(name) or {"seconds": seconds}

    turns = take_turns({"a": contender("a", 2.0), "b": contender("b", 1.0)}, 3)
    assert order == ["a", "b"] * 3
    assert [len(each) for each in turns.values()] == [3, 3]
    assert ratio([2.0, 40.0, 6.0], [1.0, 10.0, 2.0])["median"] == 3.0  # of the rounds' own ratios 2, 4 and 3
    assert quantiles([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == {"median": 3.5, "p20": 2.0, "p80": 5.0}


def test_the_watch_sees_what_was_given_back() -> None:
    watch = MemoryWatch()
    if not watch.exact:
        pytest.skip("this system cannot forget a peak")
    block = torch.ones(50_000_000, dtype=torch.uint8)
    del block
    assert 45e6 < watch.bytes()["above"] < 80e6


def test_counts_can_be_changed() -> None:
    parser = argparse.ArgumentParser()
    options.add_arguments(parser)
    chosen = options.read(parser.parse_args(["--set", "num_draws=3", "peer_samples=8000", "num_samples=40"]))
    assert chosen.changes == {"num_draws": 3, "peer_samples": 8000, "num_samples": 40}
    job = jobs.make_mlp(replace(chosen, size="tiny"))
    assert (job.num_draws, job.num_rows) == (3, 40)
    for wrong in ("draws=3", "num_draws=many", "num_draws=0", "num_draws"):
        with pytest.raises(SystemExit):
            parser.parse_args(["--set", wrong])


def test_nothing_is_measured_on_a_red_test(monkeypatch: pytest.MonkeyPatch) -> None:
    red = subprocess.CompletedProcess([], 1, stdout="1 failed", stderr="")
    monkeypatch.setattr(whole.subprocess, "run", lambda *_, **__: red)
    whole.require_green()  # under pytest it trusts pytest
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    with pytest.raises(SystemExit, match="nothing measured"):
        whole.require_green()
