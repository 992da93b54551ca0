"""Stores of strangers, which may say anything, and those of earlier versions, which say less."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numcodecs.blosc import Blosc

import lossk
from damage import as_before, seal_again
from lossk.disk.files import digest
from lossk.disk.sealed import read_sealed, write_sealed
from lossk.store.verify import verify_store
from sweep_kinds import N, build, losses, out_of_core


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "k.lossk"


# --- stores of strangers ---------------------------------------------------------------------------------------------


def config_of(path: Path, **changes: Any) -> None:
    write_sealed(path / "config.json", {**read_sealed(path / "config.json"), **changes})


def spec_of(path: Path, name: str, **changes: Any) -> None:
    """Change an array's description, its own and in the group's list."""
    own, group = (json.loads(file.read_text()) for file in (path / name / "zarr.json", path / "zarr.json"))
    own |= changes
    group["consolidated_metadata"]["metadata"][name] = own
    (path / name / "zarr.json").write_text(json.dumps(own))
    (path / "zarr.json").write_text(json.dumps(group))


HUGE = 2**40


def grid(*chunks: int) -> dict[str, Any]:
    return {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunks)}}}


def many_samples(path: Path) -> None:
    config_of(path, num_samples=HUGE)
    for name in ("mean", "variance", "scale", "lag1"):
        spec_of(path, name, shape=[HUGE], **grid(2**20))


HOSTILE: dict[str, Callable[[Path], None]] = {
    "many samples": lambda path: config_of(path, num_samples=HUGE),
    "many samples, by all": many_samples,
    "many draws": lambda path: config_of(path, num_draws=HUGE),
    "no draws": lambda path: config_of(path, num_draws=0),
    "a text for a count": lambda path: config_of(path, num_chains="2"),
    "true for a count": lambda path: config_of(path, num_chains=True),
    "a fraction of a tile": lambda path: config_of(path, tile=16.5),
    "no kind": lambda path: config_of(path, kind=None),
    "another centering": lambda path: config_of(path, centering=["chain"]),
    "sets beyond its rows": lambda path: config_of(path, sets={"a": [0, N + 1]}),
    "sets of texts": lambda path: config_of(path, sets={"a": ["0", "1"]}),
    "sets in a list": lambda path: config_of(path, sets=[[0, 3]]),
    "meta of another kind": lambda path: config_of(path, meta=[1]),
    "diagnostics of another kind": lambda path: config_of(path, diagnostics={"rhat": {"nested": []}, "sudo": 1}),
    "a format to come": lambda path: config_of(path, format=2),
    "tiny chunks": lambda path: spec_of(path, "mean", **grid(1)),
    "no chunks": lambda path: spec_of(path, "mean", **grid(0)),
    "negative chunks": lambda path: spec_of(path, "mean", **grid(-3)),
    "another rank": lambda path: spec_of(path, "mean", shape=[N, 1], **grid(N, 1)),
    "numbers of another kind": lambda path: spec_of(path, "scale", data_type="int64"),
    "another codec": lambda path: spec_of(path, "scale", codecs=[{"name": "bytes"}, {"name": "gzip"}]),
    "no codecs": lambda path: spec_of(path, "scale", codecs=[]),
    "codecs of texts": lambda path: spec_of(path, "scale", codecs=["bytes", "crc32c"]),
    "big-endian numbers": lambda path: spec_of(
        path, "scale", codecs=[{"name": "bytes", "configuration": {"endian": "big"}}, {"name": "crc32c"}]
    ),
}  # fmt: skip


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("change", HOSTILE)
def test_a_description_that_lies_is_refused(path: Path, change: str, sealed: bool) -> None:
    """With checksums that fit, too: by what it says."""
    lossk.LossTraces(losses()).save(path)
    HOSTILE[change](path)
    if sealed:
        with contextlib.suppress(lossk.StoreError):  # it cannot even be read to be sealed
            seal_again(path)
    with pytest.raises(lossk.StoreError):
        lossk.open(path)
    assert not verify_store(path).ok


@pytest.mark.parametrize("size", [2**31 - 1, 16 * 16 * 4 * 2, 0])
def test_a_chunk_that_would_grow_is_refused(path: Path, tmp_path: Path, size: int) -> None:
    """A few bytes that say that they hold 2 GB, or twice as much as a tile: before they are unpacked."""
    (tmp_path / "o").mkdir()
    out_of_core(tmp_path / "o")
    (tmp_path / "o" / "k.lossk").rename(path)
    content = bytearray(Blosc(cname="lz4", clevel=1, shuffle=2).encode(np.zeros((16, 32), np.float32)))
    content[4:8] = size.to_bytes(4, "little")
    (path / "tiles" / "c" / "0" / "1").write_bytes(content + digest(bytes(content))[1].to_bytes(4, "little"))
    seal_again(path)
    with pytest.raises(lossk.StoreError, match=r"tile 0, 1 .* is damaged: it holds"):
        lossk.open(path)[:, 16:32]
    assert any(problem.startswith("tiles: chunk 0, 1 is damaged") for problem in verify_store(path).problems)


FILES = ["config.json", "zarr.json", "checksums.json", "mean/zarr.json", "mean/c/0", "complete/c/0"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "large"])
def test_what_is_no_file_or_too_large_is_refused(path: Path, name: str, kind: str) -> None:
    """At once: a pipe would be waited for, a device never ends, and what is large is not read first."""
    lossk.LossTraces(losses()).save(path)
    file = path / name
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind == "device":
        file.symlink_to("/dev/zero")
    else:
        with file.open("wb") as large:
            large.truncate(2**36)
    with pytest.raises(lossk.StoreError):
        lossk.open(path)
    with contextlib.suppress(lossk.StoreError):
        assert not verify_store(path).ok


# --- earlier versions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tiles", "factor", "traces", "dead", "nothing"])
def test_stores_of_an_earlier_version_open(path: Path, kind: str) -> None:
    """Written by Zarr, zeros left out, no checksums of files: the same numbers, and `verify` says what they lack."""
    some = losses()
    some[:, :, 3] = 0.5
    if kind == "tiles":
        build(path)
    elif kind == "traces":
        lossk.LossTraces(some).save(path)
    else:
        some = {"dead": np.full_like(some, 0.7), "nothing": np.zeros_like(some)}.get(kind, some)
        lossk.LossKernel.from_traces(lossk.LossTraces(some)).save(path)
    expected = lossk.open(path)
    whole, mean = expected[:], expected.mean_loss
    as_before(path)
    found = lossk.open(path)
    assert torch.equal(found[:], whole)
    assert torch.equal(found.mean_loss, mean)
    checked = verify_store(path)
    assert checked.problems == []
    assert any("an earlier version wrote none" in check for check in checked.checks)
    found.save(path, overwrite=True)
    assert torch.equal(lossk.open(path)[:], whole)


@pytest.mark.parametrize("name", ["mean", "variance", "scale", "lag1", "chain_mean"])
def test_a_lost_moment_of_an_earlier_version_is_not_zero(path: Path, name: str) -> None:
    lossk.LossKernel.from_traces(lossk.LossTraces(losses())).save(path)
    as_before(path)
    (path / name / "c" / "0" / ("0" if name == "chain_mean" else "")).unlink()
    with pytest.raises(lossk.StoreError, match=f"{name}.* is missing"):
        lossk.open(path)
    assert any(problem.startswith(f"{name}: chunk") for problem in verify_store(path).problems)


@pytest.mark.parametrize("left", [(), ("zarr.json",), ("zarr.json", "c")])
def test_an_earlier_version_killed_while_it_said_complete(path: Path, left: tuple[str, ...]) -> None:
    """Between the making of `complete/`, its description and its number: unfinished, and finished by a resume."""
    build(path)
    whole = lossk.open(path)[:]
    as_before(path)
    for entry in (path / "complete").iterdir():
        if entry.name not in left:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    shutil.rmtree(path / "complete" / "c", ignore_errors=True)
    with pytest.raises(lossk.StoreError, match="unfinished: 6 of 6 draws"):
        lossk.open(path)
    build(path)
    assert torch.equal(lossk.open(path)[:], whole)
    assert verify_store(path).ok


@pytest.mark.parametrize("left", [[], ["zarr.0123abcd.partial"], [".lock", "zarr.json", "losses/zarr.json"]])
def test_an_earlier_version_killed_at_its_start(path: Path, left: list[str]) -> None:
    """What it left is cleared away; anything else is somebody's."""
    for name in left:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("{")
    path.mkdir(exist_ok=True)
    build(path)
    assert verify_store(path).ok
    assert not any(name.endswith(".partial") for name in os.listdir(path))


def test_what_is_somebody_s_is_not_taken(path: Path) -> None:
    path.mkdir()
    (path / "thesis.tex").write_text("precious")
    with pytest.raises(lossk.StoreError, match=r"k\.lossk.* is taken: it holds \['thesis\.tex'\]"):
        build(path)
    assert os.listdir(path) == ["thesis.tex"]
