"""Under devinterp 2.0.1: its compute_* on lossk's results, lossk's on its, and equal influence functions."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from devinterp.slt import bif as their_bif
from devinterp.slt import config, sampling
from devinterp.slt.llc import compute_llc
from devinterp.slt.susceptibilities import compute_susceptibilities
from torch import Tensor, nn

import lossk
from lossk.interop import devinterp

torch.set_num_threads(1)
VOCABULARY, LENGTH = 7, 6
SETTINGS: dict[str, Any] = {"lr": 1e-3, "n_beta": 20.0, "localization": 5.0, "num_chains": 2, "num_draws": 10}
SETTINGS |= {"batch_size": 8, "num_burnin_steps": 3, "num_steps_bw_draws": 2, "init_seed": 1}


class TinyLM(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed, self.drop, self.head = nn.Embedding(VOCABULARY, 8), nn.Dropout(dropout), nn.Linear(8, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.drop(torch.tanh(self.embed(tokens))))


class Sequences(torch.utils.data.Dataset):
    def __init__(self, count: int, seed: int) -> None:
        self.ids = torch.randint(0, VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index]}


TRAIN, OTHER = Sequences(64, 0), Sequences(40, 1)
OBSERVABLES = {"a-b": OTHER, "train": (TRAIN, 4)}


def network() -> TinyLM:
    torch.manual_seed(0)
    return TinyLM(0.1)


@pytest.fixture(scope="module")
def trees() -> dict[str, Any]:
    return {
        "theirs": sampling.sample(network(), TRAIN, OBSERVABLES, **SETTINGS),
        "ours": devinterp.sample(network(), TRAIN, OBSERVABLES, **SETTINGS),
    }


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (devinterp.sample, sampling.sample),
        (devinterp.compute_bif, their_bif.compute_bif),
        (devinterp.bif, their_bif.bif),
    ],
)
def test_the_arguments_are_theirs(ours: Any, theirs: Any) -> None:
    """By name, in their order, with their defaults and kinds."""
    signatures = (inspect.signature(function).parameters.values() for function in (ours, theirs))
    mine, expected = ([(p.name, p.kind, p.default) for p in parameters] for parameters in signatures)
    assert mine == expected


def test_the_trees_are_alike(trees: dict[str, Any]) -> None:
    ours, theirs = trees["ours"].dataset, trees["theirs"].dataset
    assert set(ours.data_vars) == set(theirs.data_vars)
    for name in theirs.data_vars:
        assert ours[name].dims == theirs[name].dims
        assert ours[name].shape == theirs[name].shape
        assert ours[name].dtype == theirs[name].dtype
    for name in ("input_ids_a_b", "input_ids_train"):
        assert np.array_equal(ours[name].values, theirs[name].values)


@pytest.mark.parametrize("which", ["ours", "theirs"])
@pytest.mark.parametrize("method", ["token", "average", "sequence"])
@pytest.mark.parametrize("covariance", [True, False])
@pytest.mark.parametrize("reduction", ["stack", "mean"])
def test_influence_is_theirs(trees: dict[str, Any], which: str, method: str, covariance: bool, reduction: str) -> None:
    arguments = {
        "correlation_method": "token" if method == "average" else method,
        "average_tokenwise_bif": method == "average",
        "compute_covariance": covariance,
        "reduce_chain_dimension_method": reduction,
        "batch_index_range_2": [3, 1, 30],
    }
    ours = devinterp.compute_bif(trees[which], **arguments)
    theirs = their_bif.compute_bif(trees[which], **arguments)
    assert list(ours.coords) == list(theirs.coords)
    # float32 rounding of losses near 2 whose deviations are a tenth of it, in a sum over 20 draws
    xr.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-6)


def test_influence_of_a_loss_that_never_varies(trees: dict[str, Any]) -> None:
    dataset = trees["theirs"].to_dataset().copy(deep=True)
    dataset["loss_train"][:, :, 3] = 0.5  # whose float32 mean is exactly that
    tree = xr.DataTree(dataset)
    ours = devinterp.compute_bif(tree, correlation_method="sequence")
    theirs = their_bif.compute_bif(tree, correlation_method="sequence")
    assert np.isnan(ours["influences"].values).any()
    xr.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-6)


def test_learning_coefficients_of_ours(trees: dict[str, Any]) -> None:
    found = compute_llc(trees["ours"])
    dataset = trees["ours"].dataset
    excess = dataset["sampling_loss_micro"].values.astype(np.float64).mean() - dataset["init_loss"].values.mean()
    assert float(found["llc_scalar"]) == pytest.approx(20.0 * excess, rel=1e-4)
    assert np.isfinite(found["llc_per_chain"].values).all()


def test_susceptibilities_of_ours(trees: dict[str, Any]) -> None:
    restricted = devinterp.sample(network(), TRAIN, OBSERVABLES, param_masks={"head.weight": None}, **SETTINGS)
    found = compute_susceptibilities({"full": trees["ours"], "head": restricted}, "train")
    assert np.isfinite(found["susceptibilities"]["sus"].values).all()


def test_exports_of_traces(trees: dict[str, Any]) -> None:
    traces = devinterp.read_traces(trees["theirs"], per_token=True)
    tree = devinterp.to_datatree(traces, init_loss=2.0)
    a, b = (their_bif.compute_bif(t)["influences"] for t in (tree, trees["theirs"]))
    xr.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert traces.excess is not None
    level = float(compute_llc(tree)["llc_scalar"])
    assert level == pytest.approx(20.0 * float(traces.excess.mean()), rel=1e-3, abs=1e-4)


def test_exports_of_a_build() -> None:
    """A classifier sampled by lossk: devinterp's learning coefficient is lossk's, and its BIF the pooled kernel."""
    torch.manual_seed(0)
    x, y = torch.randn(60, 4), torch.arange(60) % 3
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    sampler = lossk.SGLD(
        lr=1e-3, n_beta=15.0, localization=1.0, batch_size=20, num_burnin_steps=10, num_steps_bw_draws=2
    )
    traces = lossk.sample_losses(model, (x, y), sampler=sampler, num_chains=2, num_draws=30, progress=False)
    tree = devinterp.to_datatree(traces)
    kernel = lossk.LossKernel.from_traces(traces, centering="pooled")
    assert kernel.diagnostics is not None
    assert float(compute_llc(tree)["llc_scalar"]) == pytest.approx(kernel.diagnostics.llc, rel=1e-3, abs=1e-3)
    found = their_bif.compute_bif(tree, correlation_method="sequence", compute_covariance=True)["influences"].values
    scale = np.sqrt(np.outer(np.diag(found), np.diag(found)))
    assert (np.abs(found - kernel.to_numpy()) / scale).max() < 1e-4


def test_stores_of_both_are_opened_by_both(tmp_path: Path, trees: dict[str, Any]) -> None:
    ours, theirs = tmp_path / "ours.zarr", tmp_path / "theirs.zarr"
    devinterp.sample(network(), TRAIN, OBSERVABLES, output_path=ours, **SETTINGS)
    sampling.sample(network(), TRAIN, OBSERVABLES, output_path=theirs, **SETTINGS)
    again = sampling.sample(network(), TRAIN, OBSERVABLES, output_path=ours, **SETTINGS)  # their cache
    xr.testing.assert_equal(again.dataset.load(), trees["ours"].dataset)
    again = devinterp.sample(network(), TRAIN, OBSERVABLES, output_path=theirs, **SETTINGS)
    assert np.array_equal(devinterp.read_traces(again).losses, devinterp.read_traces(trees["theirs"]).losses)


def test_their_failed_chain_is_refused() -> None:
    with pytest.warns(UserWarning, match="Chain failed"):
        tree = sampling.sample(network(), TRAIN, OBSERVABLES, **(SETTINGS | {"lr": 1e9}))
    with pytest.raises(ValueError, match=r"loss_a_b must be finite; chain 0"):
        devinterp.read_traces(tree)


def test_our_optimizer_in_their_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(config.SAMPLING_METHODS, "sgmcmc_sgld", devinterp.sgld)
    masks = {"head.weight": None, "embed.weight": (torch.arange(VOCABULARY * 8).view(VOCABULARY, 8) % 2).float()}
    tree = sampling.sample(network(), TRAIN, OBSERVABLES, param_masks=masks, **SETTINGS)
    assert np.isfinite(devinterp.read_traces(tree).losses).all()


def test_the_law_is_theirs() -> None:
    """Mean losses of long chains agree within their standard errors, at the same settings, dropout aside."""
    settings = SETTINGS | {"num_chains": 4, "num_draws": 100, "num_burnin_steps": 100, "lr": 2e-3}
    means = []
    for sample in (sampling.sample, devinterp.sample):
        torch.manual_seed(0)
        tree = sample(TinyLM(), TRAIN, {"train": (TRAIN, 8)}, **settings)
        means.append(tree.dataset["loss_train"].values.mean(axis=(1, 2, 3)))
    error = (means[0].var(ddof=1) / 4 + means[1].var(ddof=1) / 4) ** 0.5
    assert abs(means[0].mean() - means[1].mean()) < 4 * error
