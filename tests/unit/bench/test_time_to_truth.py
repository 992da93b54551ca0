"""The study `time_to_truth`: its statistics against known truths, clocks and page, and a tiny run without the peer."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from bench import peers_devinterp as script
from bench.studies import time_to_truth as bench
from bench.studies import time_to_truth_ours as ours
from bench.studies.time_to_truth_networks import Network, as_layers
from bench.studies.time_to_truth_page import page
from bench.studies.time_to_truth_peer import Cost, PeerRun, Settings, at_defaults, grid, measure_grid, wholly_default
from bench.studies.time_to_truth_statistics import (
    Entries,
    Running,
    draws_needed,
    entries,
    first_passage,
    pearson,
    reliability,
)
from torch import nn

import lossk
from lossk.recipes.arithmetic import OneNetwork

LEVEL = 0.95


class Planted:
    """Independent normal draws of N samples with a known correlation matrix of a few factors."""

    def __init__(self, num_samples: int = 150, factors: int = 3, noise: float = 2.0) -> None:
        rng = np.random.default_rng(7)
        loadings = rng.standard_normal((num_samples, factors))
        covariance = loadings @ loadings.T + noise**2 * np.eye(num_samples)
        self.root = np.linalg.cholesky(covariance)
        std = np.sqrt(np.diag(covariance))
        above = np.triu_indices(num_samples, 1)
        self.rho = (covariance / np.outer(std, std))[above]
        self.truth = Entries(torch.from_numpy(covariance[above]), torch.from_numpy(self.rho).float())

    def draw(self, chains: int, draws: int, seed: int = 0) -> torch.Tensor:
        x = np.random.default_rng(seed).standard_normal((chains, draws, len(self.root)))
        return torch.from_numpy(x @ self.root.T).float()

    @property
    def noise_over_signal(self) -> float:
        """V / S: a sample correlation of f degrees of freedom has variance (1 - rho^2)^2 / f about rho."""
        return float(np.mean((1 - self.rho**2) ** 2) / np.var(self.rho))


@pytest.fixture(scope="module")
def planted() -> Planted:
    return Planted()


# -- statistics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("centering", ["chain", "pooled"])
def test_entries_are_those_of_the_covariance(centering: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 7, 11)) + 5 * rng.standard_normal((3, 1, 11))
    x[..., 2] = 0.5  # no variance
    x *= np.logspace(-7, 0, 11)
    found = entries(torch.from_numpy(x), centering)
    centered = x - x.mean(axis=1 if centering == "chain" else (0, 1), keepdims=True)
    rows = centered.reshape(-1, 11)
    expected = rows.T @ rows / (3 * 6 if centering == "chain" else 20)
    std = np.where(np.diag(expected) > 1e-30, np.sqrt(np.diag(expected)), np.inf)
    above = np.triu_indices(11, 1)
    np.testing.assert_allclose(found.correlation.numpy(), (expected / np.outer(std, std))[above], atol=1e-6)
    scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))[above]
    assert np.all(np.abs(found.covariance.numpy() - expected[above]) <= 1e-6 * scale + 1e-40)


def test_pearson_of_what_has_none_is_not_a_number() -> None:
    assert pearson(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 3.0, 2.0])) == pytest.approx(
        np.corrcoef([1, 2, 4], [1, 3, 2])[0, 1]
    )
    assert math.isnan(pearson(torch.ones(3), torch.tensor([1.0, 2.0, 3.0])))
    assert math.isnan(pearson(torch.tensor([1.0, math.nan, 3.0]), torch.tensor([1.0, 2.0, 3.0])))


def test_passage_of_planted_draws_is_where_theory_has_it(planted: Planted) -> None:
    """r^2 = S / (S + V / f) = 0.95^2 at f = C (d - 1) degrees of freedom; 6 % is what three seeds scatter by, twice."""
    freedom = planted.noise_over_signal * LEVEL**2 / (1 - LEVEL**2)
    for chains, seed in ((1, 1), (4, 2), (4, 3)):
        running = Running(planted.draw(chains, 400, seed), planted.truth)
        passage = running.passage("R", LEVEL)
        assert passage.draws is not None
        assert passage.draws == pytest.approx(freedom / chains + 1, rel=0.12)
        assert running.at(passage.draws)["R"] >= LEVEL
        assert not running.at(passage.draws - max(2, passage.draws // 20))["R"] >= LEVEL


def test_discarded_draws_do_not_count(planted: Planted) -> None:
    losses = planted.draw(2, 100)
    losses[:, :20] *= 30.0  # a start far from the law
    spoilt, kept = (Running(losses, planted.truth, discard=discard) for discard in (0.0, 0.2))
    assert kept.kept_from(100) == 20
    assert kept.at(100)["R"] == pytest.approx(entries(losses[:, 20:]).likeness(planted.truth)["R"])
    assert kept.at(100)["R"] > spoilt.at(100)["R"] + 0.05


def test_the_better_centering_counts(planted: Planted) -> None:
    losses = planted.draw(20, 5)  # many short chains: their means are most of what there is to know
    one, other, both = (
        Running(losses, planted.truth, centerings=names).at(5)["R"]
        for names in (("chain",), ("pooled",), ("chain", "pooled"))
    )
    assert other > one
    assert both == max(one, other)


def test_reliability_is_the_signal_share(planted: Planted) -> None:
    """S / (S + V / f) with f of all chains, from halves: Spearman and Brown's formula is exact for this."""
    for chains, draws, seed in ((8, 30, 0), (7, 60, 1)):
        found = reliability(planted.draw(chains, draws, seed))
        expected = 1 / (1 + planted.noise_over_signal / (chains * (draws - 1)))
        assert found["R"] == pytest.approx(expected, abs=0.02)
        # What it promises: the truth shows its square root.
        likeness = entries(planted.draw(chains, draws, seed)).likeness(planted.truth)
        assert likeness["R"] == pytest.approx(math.sqrt(found["R"]), abs=0.02)
    with pytest.raises(ValueError, match="at least 2 chains, got 1"):
        reliability(planted.draw(1, 30))


@pytest.mark.parametrize("target", [4, 5, 6, 17, 100, 731, 1000])
def test_first_passage_finds_a_step(target: int) -> None:
    looked: list[int] = []

    def score(draws: int) -> float:
        looked.append(draws)
        return float(draws >= target)

    passage = first_passage(score, 1000, 0.5)
    assert passage.draws is not None
    assert target <= passage.draws <= target + max(1, round(0.03 * target))
    assert len(looked) == len(set(looked)) < 30
    assert [draws for draws, _ in passage.curve] == sorted(looked)


def test_first_passage_never() -> None:
    passage = first_passage(lambda draws: draws / 200, 100, LEVEL)
    assert passage.draws is None
    assert passage.curve[-1] == (100, 0.5)
    assert passage.last == 0.5
    assert first_passage(lambda draws: math.nan, 100, LEVEL).draws is None
    with pytest.raises(ValueError, match="at least 4 draws, got 3"):
        first_passage(lambda draws: 1.0, 3, LEVEL)


def test_draws_needed_undoes_the_law_of_the_noise() -> None:
    at = {draws: math.sqrt(1 / (1 + 35.0 / draws)) for draws in (20, 323)}
    assert draws_needed(20, at[20], at[323]) == pytest.approx(323)
    assert draws_needed(20, -0.1, LEVEL) == draws_needed(20, math.nan, LEVEL) == math.inf


# -- clocks -----------------------------------------------------------------------------------------------------------


def test_seconds_of_the_peer_add_up_over_its_chains() -> None:
    """Two chains: 1 s to set up, 2 s per draw's steps, 0.5 s for its losses."""
    entry = torch.tensor([[3.0, 5.5, 8.0], [11.5, 14.0, 16.5]], dtype=torch.float64)
    run = PeerRun(torch.zeros(2, 3, 1), entry, entry + 0.5)
    assert run.seconds(3) == pytest.approx(2 * (1 + 3 * 2.5)) == pytest.approx(float(run.exit[-1, -1]))
    assert run.seconds(2) == pytest.approx(2 * (1 + 2 * 2.5))
    assert run.seconds(3, discarded=2) == pytest.approx(2 * (1 + 3 * 2.5 - 2 * 0.5))


def test_draws_that_fit_take_their_time() -> None:
    cost = Cost(chain=1.0, step=0.2, losses=0.5)
    settings = Settings(1e-3, 10.0, 1.0, num_chains=2, num_steps_bw_draws=5, discard=0.2)
    assert cost.draws(settings, 2 * (1 + 30 * (5 * 0.2 + 0.8 * 0.5)) + 0.01) == 30
    assert cost.draws(settings, 0.0) == 10  # the fewest


def test_seconds_of_ours_lie_between_two_runs(monkeypatch: pytest.MonkeyPatch, planted: Planted) -> None:
    """0.3 s per draw of all chains after 7 s of everything else; 200 draws do not suffice, so a longer run is made."""
    asked: list[int] = []

    def timed(network: Any, sampler: Any, *, num_chains: int, num_draws: int, **_: Any) -> tuple[Any, float]:
        asked.append(num_draws)
        losses = (
            planted.draw(num_chains, num_draws) + planted.draw(num_chains, num_draws, seed=9)[..., torch.randperm(150)]
        )
        return lossk.LossTraces(losses, meta={"sampler": {"lr": 0.1}}), 7 + 0.3 * num_draws

    monkeypatch.setattr(ours, "timed", timed)
    reference = ours.Reference(planted.truth, {"R": 1.0, "K": 1.0}, 8, 100, 1.0, {})
    network: Any = None
    found = ours.measure("x", network, None, reference, level=0.6, seconds=1e3, seed=0)
    assert asked == [2, 200]
    assert found.draws["R"] is not None
    assert found.seconds["R"] == pytest.approx(7 + 0.3 * found.draws["R"])
    assert found.ran == pytest.approx(7 + 0.3 * 200)
    never = ours.measure("x", network, None, reference, level=0.99, seconds=100.1, seed=0)
    assert never.seconds["R"] is None
    assert asked[-1] == 310 == never.ran_draws  # as many as 100.1 s hold after the 7.6 s of two draws


# -- the peer's side --------------------------------------------------------------------------------------------------


def test_networks_are_rebuilt_from_plain_data() -> None:
    models = (
        nn.Sequential(
            nn.Conv2d(1, 3, 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(12, 4),
        ),
        nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Tanh(), nn.Linear(5, 2)),
    )  # fmt: skip
    for model in models:
        model(torch.randn(9, 1, 8, 8))  # moves batch norm's statistics off their start
        layers = json.loads(json.dumps(script.describe(model.eval())))
        again = script.rebuild(layers, model.state_dict())
        x = torch.randn(4, 1, 8, 8)
        assert torch.equal(again(x), model(x))
        assert not any(module.training for module in again.modules())
    with pytest.raises(TypeError, match=r"must consist of .*, got GELU"):
        script.describe(nn.Sequential(nn.GELU()))
    with pytest.raises(TypeError, match=r"nn\.Sequential, got Linear"):
        script.describe(nn.Linear(2, 2))


def test_the_multitask_network_as_layers_is_the_same_function() -> None:
    model = OneNetwork(7, 2, 16, 3.0)
    x = torch.rand(5, 16)
    layers, scale = as_layers(model)
    torch.testing.assert_close(layers(x * scale), model(x))
    assert [layer[0] for layer in script.describe(layers)] == ["Linear", "ReLU", "Linear"]


def test_losses_of_the_peer_keep_their_digits() -> None:
    model = nn.Identity()
    x = torch.tensor([[20.0, 0.0], [3.0, 1.0], [0.0, 25.0]]).repeat(700, 1)
    y = torch.tensor([0, 1, 1]).repeat(700)
    out = torch.full((2100,), math.nan)
    script.sample_losses(model, x, y, out)
    expected = [math.log1p(math.exp(-20)), math.log1p(math.exp(2)), math.log1p(math.exp(-25))]
    np.testing.assert_allclose(out.numpy(), np.tile(expected, 700), rtol=1e-4)


@pytest.mark.parametrize("fast", [True, False])
def test_both_loaders_shuffle_every_sample_once(fast: bool) -> None:
    loader = script.make_loader(torch.arange(10.0).unsqueeze(1), torch.arange(10), 4, fast)
    epochs = [torch.cat([y for _, y in loader]).tolist() for _ in range(2)]
    assert (len(loader), loader.batch_size) == (3, 4)
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10))
    assert epochs[0] != epochs[1]
    assert all(torch.equal(x[:, 0].long(), y) for x, y in loader)


def test_grid_and_defaults() -> None:
    law = ours.Law(40.0, 3.0, lossk.SGLD(lr=1e-4, n_beta=40.0, localization=3.0))
    points = grid(law, "SGLD")
    assert len({(point.lr, point.num_steps_bw_draws) for point in points}) == len(points) == 20
    assert {(point.n_beta, point.localization) for point in points} == {(40.0, 3.0)}
    assert min(point.lr for point in points) == pytest.approx(1e-5)
    assert max(point.lr for point in points) == pytest.approx(1e-3)
    plain = at_defaults(40.0, 3.0)
    assert (plain.lr, plain.num_chains, plain.num_steps_bw_draws, plain.discard) == (0.01, 10, 1, 0.0)
    assert wholly_default() == replace(plain, n_beta=256 / math.log(256), localization=0.0)


class FakePeer:
    """Gets there after `needs[lr]` seconds."""

    def __init__(self, needs: dict[float, float]) -> None:
        self.needs, self.asked = needs, list[tuple[float, float]]()

    def measure(self, name: str, settings: Settings, reference: Any, *, level: float, seconds: float) -> ours.Result:
        self.asked.append((settings.lr, seconds))
        need = self.needs[settings.lr]
        if math.isinf(need):
            return ours.Result(name, settings.plain(), note="diverged: lr")
        there = need <= seconds
        likeness = {"R": LEVEL * min(1.0, seconds / need), "K": 0.5}
        return ours.Result(
            name, settings.plain(), {"R": need if there else None, "K": None}, {"R": 50 if there else None, "K": None},
            ran=seconds, ran_draws=100, likeness=likeness,
        )  # fmt: skip


def measured(needs: dict[float, float]) -> tuple[FakePeer, list[ours.Result]]:
    fake: Any = FakePeer(needs)
    points = [Settings(lr, 1.0, 1.0, 4, steps) for lr in needs for steps in (1, 5)]
    reference: Any = None
    return fake, measure_grid(fake, points, reference, level=LEVEL, short=10.0, long=40.0, say=lambda text: None)


def test_only_the_likest_points_run_long_and_only_when_none_is_there() -> None:
    fake, results = measured({1.0: 30.0, 2.0: 100.0, 3.0: math.inf})
    assert fake.asked[6:] == [(1.0, 40.0), (1.0, 40.0), (2.0, 40.0)]
    assert [result.seconds["R"] for result in results] == [30.0, 30.0, None, None, None, None]
    fake, results = measured({1.0: 9.0, 2.0: 100.0})
    assert len(fake.asked) == 4
    assert results[0].seconds["R"] == 9.0


# -- a run, and its page ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> Network:
    torch.manual_seed(0)
    x = torch.randn(40, 4)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    return Network(
        "tiny", "MLP 4-6-3", nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), (x, y), (x[:30], y[:30])
    )


def test_the_law_is_the_defaults_choice(tiny: Network) -> None:
    law = ours.find_law(tiny)
    assert law.n_beta == pytest.approx(30 / math.log(30))
    assert law.sgld.resolved
    assert (law.sgld.n_beta, law.sgld.localization) == (law.n_beta, law.localization)
    given = ours.find_law(tiny, lossk.SGLD(n_beta=20.0, localization=60.0))
    assert (given.n_beta, given.localization) == (20.0, 60.0)


@pytest.fixture(scope="module")
def record(tiny: Network) -> dict[str, Any]:
    """A tiny network without the peer, at a law that mixes fast, to a level that is within its reach."""
    settings = {"lr": 4e-3, "batch_size": 16, "num_burnin_steps": 20, "num_steps_bw_draws": 5}
    law = ours.Law(10.0, 100.0, lossk.SGLD(n_beta=10.0, localization=100.0, **settings))
    budget = bench.Budget(level=0.8, reference=1.0, ours=2.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "find_law", lambda network, seed: law)
        patch.setattr(ours, "REFERENCE_CHAINS", 4)
        patch.setattr(ours, "NUM_DRAWS", 40)
        found = bench.compare(tiny, budget, variants={"lossk default": lambda law: law.sgld}, say=lambda text: None)
    machine = {"device": "a CPU", "num_threads": 1, "git_sha": "0123"}
    whole = {
        "environment": machine, "versions": {"torch": "2"}, "budget": vars(budget), "seed": 0, "clock": "wall",
        "networks": {"tiny": {**found, "git_sha": "0123"}},
    }  # fmt: skip
    return json.loads(json.dumps(bench.plain(whole), allow_nan=False))


def test_a_tiny_run_without_the_peer(record: dict[str, Any]) -> None:
    found = record["networks"]["tiny"]
    result = found["ours"][0]
    assert found["law"]["localization"] == result["settings"]["localization"]
    assert found["reference"]["settings"]["localization"] == found["law"]["localization"]
    assert found["reference"]["settings"]["step_size"] > 0
    assert 0 < found["reference"]["reliability"]["R"] <= 1
    assert result["draws"]["R"] >= 4
    assert 0 < result["seconds"]["R"] <= result["ran"]
    text = page(record)
    assert "devinterp was not there to be measured" in text
    assert "| lossk default | " in text
    assert "nan" not in text


def test_the_page_states_ratios_and_bounds(record: dict[str, Any]) -> None:
    def result(name: str, seconds: float | None, **more: Any) -> dict[str, Any]:
        base = ours.Result(name, {"lr": 0.1, "num_steps_bw_draws": 5, "num_chains": 4}, ran=90.0, note="rises")
        return {**vars(base), "seconds": {"R": seconds, "K": 1.0}, "likeness": {"R": 0.9, "K": 0.8}, **more}

    found = {**record["networks"]["tiny"], "ours": [result("lossk default", 2.0)]}
    slow = {"settings": {"lr": 0.1, "num_steps_bw_draws": 1, "num_chains": 4}}
    found["peer"] = {
        "versions": {"devinterp": "1.3.2"},
        "costs": {"SGLD": {"chain": 0.1, "step": 1e-3, "losses": 2e-3}},
        "method": "SGLD",
        "defaults": result("d", None),
        "wholly": result("w", None, likeness={}, note="diverged: it did"),
        "grid": [result("g", 7.0), result("h", None, likeness={}, **slow)],
    }
    text = page({**record, "networks": {"tiny": found}})
    assert "| tiny | 2 s | > 45 x (> 90 s) | 3.5 x (7 s) |" in text
    assert "| 0.1 | diverged | 7 |" in text
    assert "diverged: it did" in text
    assert "not there to be measured" not in text
    found["peer"]["defaults"]["likeness"] = {}
    assert "| tiny | 2 s | never: it diverges | 3.5 x (7 s) |" in page({**record, "networks": {"tiny": found}})
