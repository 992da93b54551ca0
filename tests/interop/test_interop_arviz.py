"""Traces and kernels in xarray and in ArviZ's groups."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

import lossk
from lossk.interop.arviz import to_inferencedata, to_xarray

TRACES = lossk.LossTraces(
    torch.rand(4, 50, 6, generator=torch.Generator().manual_seed(0)) + 1.0,
    excess=torch.rand(4, 50, generator=torch.Generator().manual_seed(1)),
    n_beta=5.0,
    tokens=torch.tensor([[0, 0], [0, 1], [1, 0], [0, 0], [0, 2], [1, 1]]),
    sets={"left": slice(0, 3), "right": slice(3, 6)},
)


def test_traces_in_xarray() -> None:
    dataset = to_xarray(TRACES)
    assert dataset["loss"].dims == ("chain", "draw", "sample")
    assert np.array_equal(dataset["loss"].values, TRACES.losses.numpy())
    right = dataset.where(dataset["set"] == "right", drop=True)
    assert right["token_position"].values.tolist() == [0, 2, 1]


@pytest.mark.parametrize("correlation", [False, True])
def test_kernels_in_xarray(correlation: bool) -> None:
    kernel = lossk.LossKernel.from_traces(TRACES)
    dataset = to_xarray(kernel, correlation=correlation)
    name = "correlation" if correlation else "covariance"
    assert np.array_equal(dataset[name].values, kernel.to_numpy(correlation=correlation))
    assert np.array_equal(dataset["variance"].values, kernel.variance.numpy())
    assert dataset[name].sel(sample=2, other=[1, 3]).shape == (2,)
    with pytest.raises(TypeError, match="LossTraces or a LossKernel"):
        to_xarray(kernel[:])  # type: ignore[arg-type]


def test_arviz_reads_it() -> None:
    arviz_stats = pytest.importorskip("arviz_stats")
    tree = to_inferencedata(TRACES)
    assert sorted(tree.children) == ["log_likelihood", "posterior"]
    losses = TRACES.losses.numpy()
    assert np.array_equal(tree["log_likelihood"]["loss"].values, -losses)
    assert np.array_equal(tree["posterior"]["excess_loss"].values, TRACES.excess)
    assert tree.attrs["n_beta"] == 5.0
    summary = arviz_stats.summary(tree, kind="diagnostics", round_to="none")
    expected = lossk.LossKernel.from_traces(TRACES).diagnostics
    assert expected is not None
    assert summary.loc["mean_loss", "r_hat"] == pytest.approx(expected.rhat)
    loo = arviz_stats.loo(tree, pointwise=True)
    mean = np.log(np.exp(-losses.astype(np.float64)).mean(axis=(0, 1))).sum()
    assert loo.elpd < mean  # what leaving a sample out costs


def test_importing_lossk_imports_none_of_them() -> None:
    import subprocess

    code = "import sys, lossk, lossk.interop; print([m for m in sys.modules if m.partition('.')[0] in " + (
        "('xarray', 'sklearn', 'arviz_base', 'posteriors', 'lightning', 'transformers', 'devinterp')])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
