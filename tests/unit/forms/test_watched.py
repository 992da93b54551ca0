"""The traces of watched samples are kept with every kernel, in memory and in its store."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import lossk
from damage import as_before, seal_again
from lossk.disk.chunks import Chunks
from lossk.forms.watched import Watched, watched_samples
from lossk.store.verify import verify_store
from streamed_kernels import kernel_from_panels
from sweep_kinds import NAME, build, out_of_core

SETTINGS = {"num_chains": 2, "panel": 2}


def made_of(losses: torch.Tensor, centering: str = "chain") -> lossk.LossKernel:
    chains, draws, samples = losses.shape
    panels = ((c, part) for c in range(chains) for part in losses[c].split(3))
    return kernel_from_panels(panels, samples, num_chains=chains, num_draws=draws, tile=16, centering=centering)


def assert_same(a: Watched | None, b: Watched | None) -> None:
    assert a is not None
    assert b is not None
    assert torch.equal(a.index, b.index)
    assert torch.equal(a.losses, b.losses)


@pytest.mark.parametrize("centering", ["chain", "pooled"])
@pytest.mark.parametrize("samples", [1, 5, 256, 257, 301])
def test_both_forms_answer_with_the_losses_themselves(samples: int, centering: str) -> None:
    losses = 3.0 + torch.randn(2, 7, samples, dtype=torch.float32)
    index = watched_samples(samples)
    assert len(index) == min(samples, 256)
    tiles = made_of(losses, centering)._watched()
    assert_same(tiles, Watched(index, losses[:, :, index]))
    factor = lossk.LossKernel.from_traces(lossk.LossTraces(losses), centering=centering)._watched()
    assert factor is not None
    assert torch.equal(factor.index, index)
    torch.testing.assert_close(factor.losses, losses[:, :, index], rtol=1e-6, atol=1e-6)


def test_a_run_keeps_them_in_memory_and_in_its_store(tmp_path: Path) -> None:
    held = build(None, **SETTINGS)
    stored = build(tmp_path / "run.lossk", **SETTINGS)
    (tmp_path / "far").mkdir()
    out_of_core(tmp_path / "far")
    assert_same(held._watched(), stored._watched())
    opened = lossk.open(tmp_path / "run.lossk")
    assert_same(held._watched(), opened._watched())
    log = np.asarray(Chunks.open(tmp_path / "run.lossk", "losses").read_all())
    found = opened._watched()
    assert found is not None
    assert np.array_equal(log[:, :, found.index.numpy()], found.losses.numpy())
    far = lossk.open(tmp_path / "far" / NAME)
    assert far.form == "tiles"
    assert_same(build(None)._watched(), far._watched())
    opened.save(tmp_path / "again.lossk")
    assert_same(held._watched(), lossk.open(tmp_path / "again.lossk")._watched())
    for name in ("run", "again"):
        checked = verify_store(tmp_path / f"{name}.lossk")
        assert checked.ok, checked.problems
        assert any(line.startswith("watched_losses: 37 samples' traces") for line in checked.checks)


def test_a_store_of_an_earlier_version_opens_without(tmp_path: Path) -> None:
    path = tmp_path / "old.lossk"
    build(path, **SETTINGS)
    as_before(path)
    opened = lossk.open(path)
    assert opened._watched() is None
    assert verify_store(path).ok
    opened.save(tmp_path / "new.lossk")
    assert lossk.open(tmp_path / "new.lossk")._watched() is None


@pytest.mark.parametrize("name", ["watched", "watched_losses"])
def test_a_lost_array_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / "run.lossk"
    build(path, **SETTINGS)
    shutil.rmtree(path / name)
    with pytest.raises(lossk.StoreError, match=name):
        lossk.open(path)
    assert any(problem.startswith(name) for problem in verify_store(path).problems)
    seal_again(path)  # as whoever never wrote it
    with pytest.raises(lossk.StoreError, match=name):
        lossk.open(path)
    assert any(problem.startswith(name) for problem in verify_store(path).problems)


@pytest.mark.parametrize("name", ["watched", "watched_losses"])
def test_others_traces_are_found(tmp_path: Path, name: str) -> None:
    """Sound by their checksums, and not of these samples."""
    path = tmp_path / "run.lossk"
    build(path, **SETTINGS)
    array = Chunks.open(path, name)
    values = array.read_all()
    changed = values[..., ::-1].copy()
    array.write((0,) * values.ndim, changed)
    seal_again(path)
    assert any(problem.startswith("watched") for problem in verify_store(path).problems)
    if name == "watched":
        with pytest.raises(lossk.StoreError, match="watched"):
            lossk.open(path)


def test_of_very_many_draws_fewer_samples_are_kept() -> None:
    assert len(watched_samples(1000, 2**16)) == 256
    assert len(watched_samples(1000, 2**18)) == 64
    assert len(watched_samples(1000, 10**9)) == 8
    assert watched_samples(5, 10**9).tolist() == [0, 1, 2, 3, 4]
