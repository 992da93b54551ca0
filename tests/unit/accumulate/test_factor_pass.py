"""`build_kernel(form="factor")`: the same kernel as the traces', in memory and in the store, whatever interrupts it.

The bound. Of D deviations, each rounded once in float32, u = 2^-24, the products are summed in float32: an entry is
within (D + 12) u sqrt(K_ii K_jj) of the exact one (test_streaming.py). Stored in float16 every deviation is rounded
once more, by 2^-11 of itself: (2 2^-11 + 2^-22) sqrt(K_ii K_jj), by Cauchy and Schwarz.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

import lossk
import oracles
from lossk.accumulate.factor_pass import HeldFactor
from lossk.store.verify import verify_store

Build = Callable[..., lossk.LossKernel]
Same = Callable[[lossk.LossKernel, lossk.LossKernel], None]


def bound(exact: np.ndarray, draws: int, dtype: str) -> np.ndarray:
    sd = np.sqrt(np.diag(exact))
    half = 2.0**-10 + 2.0**-22 if dtype == "float16" else 0.0
    return ((draws + 12) * oracles.UNIT32 + half) * np.outer(sd, sd) + oracles.TINY32


@pytest.mark.parametrize("centering", ["chain", "pooled"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "store"])
def test_equals_the_losses_covariance(
    build: Build, problem: Any, tmp_path: Path, sgld: Any, centering: str, dtype: str, on_disk: bool
) -> None:
    """Against float64 from the traces of the same call; the store is found whole."""
    out = tmp_path / "k.lossk" if on_disk else None
    kernel = build(problem.model(), problem.data, form="factor", centering=centering, dtype=dtype, out=out)
    traces = lossk.sample_losses(
        problem.model(), problem.data, sampler=sgld(), num_chains=2, num_draws=6, backend="torch", progress=False
    )
    exact = oracles.two_pass(traces.losses.numpy(), centering)
    assert (kernel.form, kernel.dtype) == ("factor", dtype)
    assert np.all(np.abs(kernel.to_numpy().astype(np.float64) - exact) <= bound(exact, 12, dtype))
    assert kernel.meta["memory"]["tiles"] == ("factor" if on_disk else "traces")
    if out is not None:
        found = verify_store(out)
        assert found.problems == []
        np.testing.assert_array_equal(lossk.open(out).to_numpy(), kernel.to_numpy())
        assert lossk.open(out).contents.blocks.tile == 16


def test_memory_and_store_hold_the_same_bits(build: Build, problem: Any, tmp_path: Path) -> None:
    """And the moments are those of tiles, to the bit: neither has a hand in them."""
    held = build(problem.model(), problem.data, form="factor")
    build(problem.model(), problem.data, form="factor", out=tmp_path / "k.lossk", panel=2)
    stored = zarr.open_array(str(tmp_path / "k.lossk" / "factor"), mode="r")[...]
    again = build(problem.model(), problem.data, form="factor", panel=2)
    np.testing.assert_array_equal(stored, again.contents.blocks.factor.numpy())
    tiles = build(problem.model(), problem.data)
    for name in ("mean", "variance", "scale", "chain_mean", "lag1"):
        np.testing.assert_array_equal(
            getattr(held.contents.moments, name), getattr(tiles.contents.moments, name), err_msg=name
        )
    assert str(held.diagnostics) == str(tiles.diagnostics)


@pytest.mark.parametrize("at", [1, 40, 75])
def test_an_interrupted_run_goes_on_bitwise(
    build: Build, problem: Any, tmp_path: Path, fail_at: Any, assert_same_kernel: Same, at: int
) -> None:
    path, asked = tmp_path / "k.lossk", {"form": "factor", "passes": lossk.Passes(probe_batch=8)}
    whole = build(problem.model(), problem.data, loss=fail_at(), **asked)
    loss = fail_at()
    build(problem.model(), problem.data, loss=loss, **asked)
    assert loss.calls > 75
    with pytest.raises(RuntimeError, match="stopped by the test"):
        build(problem.model(), problem.data, loss=fail_at(at), out=path, **asked)
    assert_same_kernel(build(problem.model(), problem.data, loss=fail_at(), out=path, resume=True, **asked), whole)


def test_interrupted_while_the_factor_is_written(
    build: Build, problem: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, assert_same_kernel: Same
) -> None:
    path = tmp_path / "k.lossk"

    def stop(_: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lossk.accumulate.factor_pass.sync", stop)
        with pytest.raises(KeyboardInterrupt):
            build(problem.model(), problem.data, form="factor", out=path)
    with pytest.raises(lossk.StoreError, match="unfinished: 12 of 12 draws"):
        lossk.open(path)
    again = build(problem.model(), problem.data, form="factor", out=path, resume=True)
    assert_same_kernel(again, build(problem.model(), problem.data, form="factor"))
    finished = build(problem.model(), problem.data, form="factor", out=path, resume=True)  # nothing left to do
    assert_same_kernel(finished, again)


def test_another_form_is_another_run(build: Build, problem: Any, tmp_path: Path) -> None:
    build(problem.model(), problem.data, form="factor", out=tmp_path / "f.lossk")
    build(problem.model(), problem.data, out=tmp_path / "t.lossk")
    with pytest.raises(lossk.StoreError, match="form: saved 'factor', now None"):
        build(problem.model(), problem.data, out=tmp_path / "f.lossk", resume=True)
    with pytest.raises(lossk.StoreError, match="form: saved None, now 'factor'"):
        build(problem.model(), problem.data, form="factor", out=tmp_path / "t.lossk", resume=True)
    with pytest.raises(ValueError, match="form must be one of"):
        build(problem.model(), problem.data, form="rows")


@pytest.mark.parametrize("on_disk", [False, True])
def test_what_does_not_fit_is_refused(build: Build, problem: Any, tmp_path: Path, on_disk: bool) -> None:
    out = tmp_path / "k.lossk" if on_disk else None
    what = "factor" if on_disk else "traces"
    with pytest.raises(MemoryError, match=f"the {what} of 21 samples need .* would fit"):
        build(problem.model(), problem.data, form="factor", memory="1kB", out=out)
    assert not (tmp_path / "k.lossk").exists()


def test_chains_side_by_side_and_dead_samples() -> None:
    """Panels of two chains in turn, as ranks send them; a sample that never varies is a column of zeros."""
    losses = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 7, 5)).astype(np.float32))
    losses[:, :, 3] = 0.1
    sums = HeldFactor(5, 16, num_chains=2, num_draws=7, centering="chain", dtype="float32")
    for first in range(0, 7, 3):
        for chain in (1, 0):
            sums.update(chain, losses[chain, first : first + 3])
    blocks, moments = sums.finalize()
    exact = oracles.two_pass(losses.numpy())
    kernel = lossk.LossKernel(blocks, moments)
    assert np.all(np.abs(kernel.to_numpy() - exact) <= bound(exact, 14, "float32"))
    assert not blocks.factor[:, 3].any()
    assert kernel.dead.tolist() == [False, False, False, True, False]
