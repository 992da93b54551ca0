"""Runs killed with SIGKILL at random moments and resumed: the same store to the byte as that of a run left alone."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import zarr

import kill_worker
import lossk
from lossk.accumulate.tile_pass import TileWriter
from lossk.disk.files import full_disk_named

Build = Callable[..., lossk.LossKernel]
Same = Callable[[lossk.LossKernel, lossk.LossKernel], None]

FEW = ["panel", "tile", "update", "time"]
THIRTY = [
    *["time"] * 9, *["sync"] * 4, *["panel"] * 4, *["tile"] * 4, *["update"] * 3, *["product"] * 2, *["commit"] * 2,
    *["state"] * 2,
]  # fmt: skip


def kill(folder: Path, seed: int, kinds: list[str]) -> list[dict[str, Any]]:
    command = [sys.executable, str(Path(kill_worker.__file__)), str(folder), str(seed), *kinds]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(found: list[dict[str, Any]], kinds: list[str]) -> None:
    assert [attempt["kind"] for attempt in found] == kinds
    assert [attempt for attempt in found if not attempt["same"]] == []


@pytest.mark.long("three forms are built, killed and resumed in processes of their own")
def test_killed_and_resumed(tmp_path: Path) -> None:
    """Inside a panel's write, inside a tile's, between two tile updates, and at some random time."""
    check(kill(tmp_path, 1, FEW), FEW)


@pytest.mark.slow
def test_thirty_of_thirty(tmp_path: Path) -> None:
    """`make test-kills`: nine at random times, the others at random calls of each place where something is written."""
    found = kill(tmp_path, 20261125, THIRTY)
    for attempt in found:
        print(attempt)
    print(f"{sum(attempt['same'] for attempt in found)} of {len(found)} kills resumed bitwise")
    assert len(found) == 30
    check(found, THIRTY)


# --- a full disk -----------------------------------------------------------------------------------------------------


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writes past `size` bytes of a file fail, as past a quota's end: the system's own failure, in mid-write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_half_way(build: Build, problem: Any, assert_same_kernel: Same, tmp_path: Path) -> None:
    """Files may have 700 bytes: config.json fails; 2,600: the commit log does, after some panels. Named; resumed."""
    asked: dict[str, Any] = {"panel": 1, "num_draws": 14}
    whole, path = build(problem.model(), problem.data, **asked), tmp_path / "k.lossk"
    for size in (700, 2600):
        with largest_file(size), pytest.raises(lossk.StoreError, match=r"k\.lossk.* full .*resume=True"):
            build(problem.model(), problem.data, out=path, resume=True, **asked)
    with pytest.raises(lossk.StoreError, match=r"unfinished: [1-9]\d? of 28 draws"):
        lossk.open(path)
    assert_same_kernel(build(problem.model(), problem.data, out=path, resume=True, **asked), whole)


@pytest.mark.parametrize("at", range(0, 40, 6))
def test_a_disk_that_is_full(
    build: Build, problem: Any, assert_same_kernel: Same, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """At any sync, where a file system that allocates late says so: named, and what was committed is kept."""
    path, whole, calls, sync = tmp_path / "k.lossk", build(problem.model(), problem.data), [0], os.fsync

    def full(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] > at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(lossk.StoreError, match=r"k\.lossk.* full \(No space left on device\).*resume=True"):
            build(problem.model(), problem.data, out=path)
    lines = (path / "commits.jsonl").read_bytes().count(b"\n") if (path / "commits.jsonl").exists() else 0
    kept = {file: file.stat().st_mtime_ns for file in (path / "losses" / "c").rglob("*") if file.is_file()}
    assert_same_kernel(build(problem.model(), problem.data, out=path, resume=True), whole)
    assert sum(file.stat().st_mtime_ns == time for file, time in kept.items()) >= lines


def test_a_disk_that_fills_up_while_tiles_are_made(
    build: Build, problem: Any, assert_same_kernel: Same, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lossk.plan.layout import in_store

    monkeypatch.setattr(
        "lossk.run.cost.choose_layout",
        lambda size, _, taken, **__: in_store(size, taken, super_panel=size.draws, stripes=1),
    )
    whole, path = build(problem.model(), problem.data, out=tmp_path / "whole.lossk"), tmp_path / "k.lossk"

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(TileWriter, "_write", full)
        with pytest.raises(lossk.StoreError, match=r"k\.lossk.* full .*resume=True"):
            build(problem.model(), problem.data, out=path)
    assert_same_kernel(build(problem.model(), problem.data, out=path, resume=True), whole)


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def stopped(build: Build, problem: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store whose run stopped in its second chain."""
    path, commit = tmp_path / "k.lossk", lossk.accumulate.runlog.RunLog.commit

    def stopping(log: Any, new: Any, **how: Any) -> None:
        commit(log, new, **how)
        if len(log.commits) == 3:
            raise RuntimeError("stopped by the test")

    with monkeypatch.context() as patch:
        patch.setattr(lossk.accumulate.runlog.RunLog, "commit", stopping)
        with pytest.raises(RuntimeError, match="stopped by the test"):
            build(problem.model(), problem.data, out=path)
    return path


def test_a_corrupted_chunk_of_the_log_is_named(build: Build, problem: Any, stopped: Path) -> None:
    """One bit of a committed panel: its checksum tells; nothing is overwritten."""
    chunk = stopped / "losses" / "c" / "0" / "1" / "0"
    content = bytearray(chunk.read_bytes())
    content[5] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(lossk.StoreError, match="losses of chain 0, draw 3 are damaged"):
        build(problem.model(), problem.data, out=stopped, resume=True)
    assert chunk.read_bytes() == bytes(content)


@pytest.mark.parametrize("damage", ["missing", "empty", "cut"])
def test_a_damaged_state_is_named(build: Build, problem: Any, stopped: Path, damage: str) -> None:
    (state,) = stopped.glob("state-*.npz")
    content = state.read_bytes()
    if damage == "missing":
        state.unlink()
    else:
        state.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    with pytest.raises(lossk.StoreError, match="the state of chain 1 after its last committed panel cannot be read"):
        build(problem.model(), problem.data, out=stopped, resume=True)


def test_a_stopped_copy_resumes_elsewhere(
    build: Build, problem: Any, assert_same_kernel: Same, stopped: Path, tmp_path: Path
) -> None:
    """What is needed is in the store: a copy, on another disk say, goes on to the same end."""
    shutil.copytree(stopped, tmp_path / "copy.lossk")
    copy = build(problem.model(), problem.data, out=tmp_path / "copy.lossk", resume=True)
    assert_same_kernel(copy, build(problem.model(), problem.data))
    assert zarr.open_group(str(tmp_path / "copy.lossk"), mode="r")["losses"].shape == (2, 6, 21)


def test_full_shared_memory_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A loader's workers write there; the store's disk is not what is full."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0 if "shm" in str(path) else usage.free))
    for path in (None, tmp_path / "k.lossk"):
        with pytest.raises(OSError, match=r"/dev/shm is full .*num_workers=0"), full_disk_named(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
