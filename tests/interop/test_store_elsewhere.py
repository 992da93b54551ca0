"""A store opens with other tools: xarray and dask, lazily, with the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask.array
import numpy as np
import pytest
import xarray
import zarr

import lossk

Build = Callable[..., lossk.LossKernel]


@pytest.fixture
def store(build: Build, problem: Any, tmp_path: Path) -> Path:
    build(problem.model(), problem.data, out=tmp_path / "k.lossk")
    return tmp_path / "k.lossk"


def test_xarray_opens_a_run(store: Path) -> None:
    """Named dimensions; the loss traces as they were drawn; moments on the axis of samples."""
    kernel = lossk.open(store)
    with xarray.open_zarr(store, consolidated=True) as found:
        assert found["losses"].dims == ("chain", "draw", "sample")
        assert found["tiles"].dims == ("row", "column")
        np.testing.assert_allclose(found["losses"].mean(("chain", "draw")).values, found["mean"].values, rtol=1e-6)
        np.testing.assert_array_equal(found["variance"].values, kernel.variance)


def test_dask_reads_a_run_by_chunks(store: Path) -> None:
    """Tiles are its chunks; times the scales they are the kernel's upper triangle."""
    kernel = lossk.open(store)
    tiles = dask.array.from_zarr(str(store), component="tiles")
    assert tiles.chunks == ((16, 5), (16, 5))
    scale = zarr.open_array(str(store / "scale"), mode="r")[...]
    found = (tiles * scale[:, None] * scale[None, :]).compute(scheduler="synchronous")
    upper = np.triu_indices(kernel.num_samples)
    np.testing.assert_allclose(found[upper], kernel.to_numpy()[upper], rtol=1e-6)


def test_dask_reads_an_export(store: Path, tmp_path: Path) -> None:
    """The dense matrix, both triangles, as a lazy array."""
    kernel = lossk.open(store)
    kernel.to_zarr(tmp_path / "dense.zarr")
    with xarray.open_zarr(tmp_path / "dense.zarr", chunks={}) as found:
        trace = found["covariance"].data
        assert isinstance(trace, dask.array.Array)
        dense = trace.compute(scheduler="synchronous")
    np.testing.assert_array_equal(dense, dense.T)
    np.testing.assert_array_equal(dense, kernel.to_numpy())
