"""The `.lossk` store: a round trip is bitwise, zarr opens it, it says what it is missing, and nothing overwrites it."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

import lossk
import oracles

Build = Callable[..., lossk.LossKernel]
Same = Callable[[lossk.LossKernel, lossk.LossKernel], None]


@pytest.fixture
def traces() -> np.ndarray:
    rng = np.random.default_rng(0)
    losses = 1 + 0.01 * rng.standard_normal((2, 7, 37)).astype(np.float32)
    losses[:, :, 5] = 0.25  # a dead sample
    losses[:, :, 6] *= np.float32(1e-20)
    return losses


@pytest.fixture(params=["float32 tiles", "float16 tiles", "pooled tiles", "factor", "pooled factor"])
def kernel(request: pytest.FixtureRequest, build: Build, problem: Any, traces: np.ndarray) -> lossk.LossKernel:
    centering = "pooled" if "pooled" in request.param else "chain"
    if "factor" in request.param:
        return lossk.LossKernel.from_traces(lossk.LossTraces(traces), centering=centering)
    dtype = request.param.split()[0] if "float" in request.param else "float32"
    return build(problem.model(), problem.data, dtype=dtype, centering=centering)


def test_round_trip(kernel: lossk.LossKernel, assert_same_kernel: Same, tmp_path: Path) -> None:
    kernel.save(tmp_path / "k.lossk")
    opened = lossk.open(tmp_path / "k.lossk")
    assert_same_kernel(opened, kernel)
    assert (opened.num_samples, opened.num_draws, opened.tile, opened.dtype) == (
        kernel.num_samples,
        kernel.num_draws,
        kernel.tile,
        kernel.dtype,
    )
    np.testing.assert_array_equal(opened.to_numpy(correlation=True), kernel.to_numpy(correlation=True))
    v = torch.linspace(-1, 1, kernel.num_samples)
    np.testing.assert_array_equal(opened.matvec(v), kernel.matvec(v))
    for mine, theirs in zip(opened.neighbors(3), kernel.neighbors(3), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_saved_twice(kernel: lossk.LossKernel, assert_same_kernel: Same, tmp_path: Path) -> None:
    """What was read from a store can be saved again, elsewhere; a string is a path too."""
    kernel.save(str(tmp_path / "a.lossk"))
    lossk.open(str(tmp_path / "a.lossk")).save(tmp_path / "b.lossk")
    assert_same_kernel(lossk.open(tmp_path / "b.lossk"), kernel)


def test_a_second_save_is_refused(kernel: lossk.LossKernel, tmp_path: Path) -> None:
    path = tmp_path / "k.lossk"
    kernel.save(path)
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    with pytest.raises((FileExistsError, lossk.errors.StoreError), match=r"k\.lossk.*exist|exist.*k\.lossk"):
        kernel.save(path)
    assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} == before


def test_overwrite_says_so(
    kernel: lossk.LossKernel, traces: np.ndarray, assert_same_kernel: Same, tmp_path: Path
) -> None:
    path = tmp_path / "k.lossk"
    lossk.LossKernel.from_traces(lossk.LossTraces(traces[:, :3])).save(path)
    kernel.save(path, overwrite=True)
    assert_same_kernel(lossk.open(path), kernel)


def test_metadata_survives(build: Build, problem: Any, sgld: Any, tmp_path: Path) -> None:
    kernel = build(problem.model(), problem.data, out=tmp_path / "k.lossk", seed=7)
    opened = lossk.open(tmp_path / "k.lossk")
    assert opened.meta["config"] == kernel.meta["config"]
    for key in ("config", "versions", "backend", "timings", "git_sha", "peak_rss_bytes", "warnings"):
        assert key in opened.meta, key
    text = json.dumps(opened.meta["config"])
    for value in ("0.001", "30.0", "7"):  # lr, n_beta, seed
        assert value in text
    timings = kernel.meta["timings"]
    assert set(timings) >= {"gradient", "step", "probe", "update", "total"}
    assert all(t >= 0 for t in timings.values())
    assert str(opened.diagnostics) == str(kernel.diagnostics)
    assert np.isfinite([kernel.diagnostics.rhat, kernel.diagnostics.ess, kernel.diagnostics.llc]).all()


def test_zarr_reads_it(build: Build, problem: Any, tmp_path: Path) -> None:
    """A Zarr v3 group with the arrays of the architecture page; one chunk per tile; the upper triangle."""
    kernel = build(problem.model(), problem.data, out=tmp_path / "k.lossk")
    group = zarr.open_group(str(tmp_path / "k.lossk"), mode="r")
    assert group.metadata.zarr_format == 3
    n = problem.num_samples
    assert group["losses"].shape == (2, 6, n)
    assert group["losses"].dtype == np.float32
    assert group["tiles"].shape == (n, n)
    assert group["tiles"].chunks == (16, 16)
    for name in ("mean", "scale", "chain_mean"):
        assert name in group
    scale = np.asarray(group["scale"][:], dtype=np.float64)
    assert np.all(np.frexp(scale)[0] == 0.5), "scales are powers of two"
    losses = np.asarray(group["losses"][:])
    np.testing.assert_allclose(np.asarray(group["mean"][:]), losses.astype(np.float64).mean((0, 1)), rtol=1e-6)
    chain_mean = np.asarray(group["chain_mean"][:])
    np.testing.assert_allclose(chain_mean, losses.astype(np.float64).mean(1), rtol=1e-6)
    k = oracles.two_pass(losses)
    np.testing.assert_allclose(kernel.to_numpy(), k, atol=1e-5 * np.diag(k).max())
    assert json.loads((tmp_path / "k.lossk" / "config.json").read_text())


def test_nothing_is_pickled(kernel: lossk.LossKernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store from a stranger must not be able to run code."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("pickle was used")

    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "save", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    kernel.save(tmp_path / "k.lossk")
    lossk.open(tmp_path / "k.lossk").to_numpy()
    for file in (tmp_path / "k.lossk").rglob("*"):
        assert file.suffix not in {".pkl", ".pt", ".pth", ".pickle", ".npy", ".npz"}, file


def test_an_incomplete_store_says_how_far_it_got(build: Build, problem: Any, fail_at: Any, tmp_path: Path) -> None:
    """12 draws were asked for; the message counts those that are safe, whole panels of 3 of them."""
    loss = fail_at()
    build(problem.model(), problem.data, loss=loss)
    total, counts = loss.calls, []
    for fraction in (0.65, 0.72, 0.8, 0.9, 0.99):  # the checks and the pilot come before
        path, loss.at, loss.calls = tmp_path / f"{fraction}.lossk", max(1, int(fraction * total)), 0
        with pytest.raises(RuntimeError, match="stopped by the test"):
            build(problem.model(), problem.data, loss=loss, out=path)
        if not path.exists():
            assert not counts
            continue
        with pytest.raises(lossk.errors.StoreError, match="resume") as caught:
            lossk.open(path)
        message = str(caught.value)
        found = re.search(r"\b(\d+) of 12 draws|no draws", message)
        assert found, message
        counts.append(int(found[1] or 0))
    assert counts == sorted(counts)
    assert set(counts) <= {0, 3, 6, 9}
    assert counts[-1] == 9


def test_killed_at_any_write(
    build: Build, problem: Any, assert_same_kernel: Same, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store as it lies on the disk before each of its syncs, from the first to the last: opens as complete with the
    right numbers or says that it is not, and resumes to the same end."""
    path, copies, sync = tmp_path / "k.lossk", [], os.fsync

    def copying(descriptor: int) -> None:
        if path.exists():
            copies.append(tmp_path / f"{len(copies)}.lossk")
            shutil.copytree(path, copies[-1])
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", copying)
    whole = build(problem.model(), problem.data, out=path)
    monkeypatch.undo()
    assert len(copies) >= 8, "one panel, one sync at the least"
    early, late = copies[:-12], copies[-12:]
    for copy in [*early[:3], *early[3::5], *late]:
        try:
            assert_same_kernel(lossk.open(copy), whole)
        except lossk.errors.StoreError as error:
            assert "resume" in str(error), copy.name  # noqa: PT017
        assert_same_kernel(build(problem.model(), problem.data, out=copy, resume=True), whole)
        assert_same_kernel(lossk.open(copy), whole)


@pytest.mark.parametrize("damage", ["missing", "changed", "cut"])
def test_a_damaged_tile_is_named_when_it_is_read(build: Build, problem: Any, tmp_path: Path, damage: str) -> None:
    """Zarr would read zeros for one that is missing; the other tiles stay readable."""
    path = tmp_path / "k.lossk"
    kernel = build(problem.model(), problem.data, out=path)
    chunk = path / "tiles" / "c" / "0" / "1"
    content = bytearray(chunk.read_bytes())
    content[7] ^= 1
    if damage == "missing":
        chunk.unlink()
    else:
        chunk.write_bytes(content if damage == "changed" else content[:30])
    found = lossk.open(path)
    assert torch.equal(found[:16, :16], kernel[:16, :16])
    with pytest.raises(lossk.StoreError, match=r"tile 0, 1 of .*k\.lossk.* is (missing|damaged)"):
        found[0, 16:]


def test_two_writers(build: Build, problem: Any, fail_at: Any, assert_same_kernel: Same, tmp_path: Path) -> None:
    """While a run writes, another that would resume the same store is refused; the first goes on unharmed."""
    path, refusals = tmp_path / "k.lossk", []
    loss = fail_at()
    whole = build(problem.model(), problem.data, loss=loss)
    at, loss.calls = loss.calls * 9 // 10, 0  # past the pilot
    inner = loss.__call__

    def intruding(model: Any, batch: Any) -> Any:
        if loss.calls == at:
            loss.calls += 1
            # This call may be the probe's: an intruder, which is a process of its own, knows no inference mode.
            with torch.inference_mode(False), pytest.raises(lossk.errors.StoreError, match=r"k\.lossk") as caught:
                build(problem.model(), problem.data, loss=intruding, out=path, resume=True)
            refusals.append(str(caught.value))
        return inner(model, batch)

    assert_same_kernel(build(problem.model(), problem.data, loss=intruding, out=path), whole)
    assert len(refusals) == 1


def test_what_is_not_a_store(tmp_path: Path) -> None:
    missing = (lossk.errors.StoreError, FileNotFoundError)
    with pytest.raises(missing, match="nowhere"):
        lossk.open(tmp_path / "nowhere.lossk")
    (tmp_path / "text.lossk").write_text("hello")
    with pytest.raises(lossk.errors.StoreError, match="text"):
        lossk.open(tmp_path / "text.lossk")
    zarr.create_group(str(tmp_path / "other.lossk"), zarr_format=3)
    with pytest.raises(lossk.errors.StoreError, match="other"):
        lossk.open(tmp_path / "other.lossk")


def test_resume_with_another_configuration_is_refused(
    build: Build, problem: Any, sgld: Any, fail_at: Any, tmp_path: Path
) -> None:
    """The message shows which setting differs and both values; the store can still be resumed as it was."""
    path, loss = tmp_path / "k.lossk", fail_at()
    build(problem.model(), problem.data, loss=loss)
    loss.at, loss.calls = int(0.7 * loss.calls), 0  # past the checks and the pilot
    with pytest.raises(RuntimeError, match="stopped by the test"):
        build(problem.model(), problem.data, loss=loss, out=path)
    loss.at = None
    with pytest.raises((ValueError, lossk.errors.StoreError), match=r"(?s)n_beta.*30.*31|n_beta.*31.*30"):
        build(problem.model(), problem.data, loss=loss, out=path, resume=True, sampler=sgld(n_beta=31.0))
    with pytest.raises((ValueError, lossk.errors.StoreError), match="seed"):
        build(problem.model(), problem.data, loss=loss, out=path, resume=True, seed=1)
    build(problem.model(), problem.data, loss=loss, out=path, resume=True)


def test_resume_with_another_model_or_other_data_is_refused(
    build: Build, problem: Any, fail_at: Any, tmp_path: Path
) -> None:
    """Draws of two models in one kernel would be a silent wrong answer."""
    path, loss, model = tmp_path / "k.lossk", fail_at(), problem.model()
    build(model, problem.data, loss=loss)
    loss.at, loss.calls = int(0.7 * loss.calls), 0
    with pytest.raises(RuntimeError, match="stopped by the test"):
        build(model, problem.data, loss=loss, out=path)
    loss.at = None
    with torch.no_grad():
        model[0].weight[0, 0] += 0.5
    with pytest.raises((ValueError, lossk.errors.StoreError), match=r"(?i)model|weight|param"):
        build(model, problem.data, loss=loss, out=path, resume=True)
    with pytest.raises((ValueError, lossk.errors.StoreError), match=r"(?i)data|input|sample|loader|probe"):
        build(problem.model(), (problem.inputs + 1, problem.targets), loss=loss, out=path, resume=True)


def test_resume_of_a_finished_run_only_reads(
    build: Build, problem: Any, fail_at: Any, assert_same_kernel: Same, tmp_path: Path
) -> None:
    loss = fail_at()
    whole = build(problem.model(), problem.data, loss=loss, out=tmp_path / "k.lossk")
    calls, loss.calls = loss.calls, 0
    again = build(problem.model(), problem.data, loss=loss, out=tmp_path / "k.lossk", resume=True)
    assert_same_kernel(again, whole)
    assert loss.calls < calls / 3


def test_resume_without_a_store_starts_one(
    build: Build, problem: Any, assert_same_kernel: Same, tmp_path: Path
) -> None:
    """The same command line serves the first run and every restart."""
    one = build(problem.model(), problem.data)
    assert_same_kernel(build(problem.model(), problem.data, out=tmp_path / "new.lossk", resume=True), one)


def test_other_zarr_readers_list_it_in_silence(build: Build, problem: Any, tmp_path: Path) -> None:
    """Listing a finished store warns of nothing (warnings are errors here), though it holds config.json too."""
    kernel = build(problem.model(), problem.data, out=tmp_path / "k.lossk")
    kernel.save(tmp_path / "saved.lossk")
    for name in ("k.lossk", "saved.lossk"):
        group = zarr.open_group(str(tmp_path / name), mode="r")
        assert {"tiles", "mean", "scale", "chain_mean", "complete"} <= {key for key, _ in group.members()}
        assert not (tmp_path / name / ".lock").exists()


def test_a_run_that_cannot_fit_is_refused_and_leaves_nothing(
    build: Build, problem: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoMemory:
        available = 1000

    monkeypatch.setattr("psutil.virtual_memory", NoMemory)
    with pytest.raises(MemoryError, match=r"the kernel of \d+ samples needs .* 1 kB are free; about \d+ samples"):
        build(problem.model(), problem.data, out=tmp_path / "k.lossk")
    assert not (tmp_path / "k.lossk").exists()
    with pytest.raises(MemoryError, match="the traces of"):
        lossk.sample_losses(problem.model(), problem.data, num_chains=1, num_draws=4, progress=False)
