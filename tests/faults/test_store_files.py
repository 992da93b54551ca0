"""A store's files: links, locks, disks that fail, and others who write."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lossk
import lossk.accumulate.tile_pass
import lossk.disk.swap
from damage import as_before
from lossk.accumulate.runlog import RunLog
from lossk.disk.sealed import read_sealed
from lossk.store.verify import verify_store
from sweep_kinds import NAME, arrays, build, kernel_of, losses, out_of_core


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "k.lossk"


@pytest.fixture
def stopped(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that stopped after three of its four panels."""
    commit = RunLog.commit

    def stopping(log: RunLog, new: Any, **how: Any) -> None:
        commit(log, new, **how)
        if len(log.commits) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "commit", stopping)
        with pytest.raises(KeyboardInterrupt):
            build(path)
    return path


# --- links -----------------------------------------------------------------------------------------------------------


LINKS = [".lock", ".config.json.part", ".commits.jsonl.part", ".state-9.npz.part", "tiles", "losses/c/1/1"]


@pytest.mark.parametrize("name", [*LINKS, "commits.jsonl"])
@pytest.mark.parametrize("hard", [False, True])
def test_nothing_is_written_through_a_link(stopped: Path, tmp_path: Path, name: str, hard: bool) -> None:
    """Refused by its name; but for a second name of a file in a leftover's place, which is cleared away as one."""
    precious = tmp_path / "precious"
    precious.write_text("precious")
    link = stopped / name
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.is_dir():
        link.rename(tmp_path / "moved")
    link.unlink(missing_ok=True)
    if hard:
        os.link(precious, link)
        with contextlib.suppress(lossk.StoreError, FileExistsError):
            build(stopped)
    else:
        link.symlink_to(precious)
        with pytest.raises(lossk.StoreError, match=re.escape(Path(name).name)):
            build(stopped)
    assert precious.read_text() == "precious"


def test_a_linked_store_is_not_overwritten(path: Path, tmp_path: Path) -> None:
    kernel_of(0).save(tmp_path / "other.lossk")
    path.symlink_to(tmp_path / "other.lossk")
    with pytest.raises(lossk.StoreError, match=r"k\.lossk.* is a symbolic link"):
        kernel_of(1).save(path, overwrite=True)
    assert torch.equal(lossk.open(path)[:], kernel_of(0)[:])


# --- locks, and others who write -------------------------------------------------------------------------------------


def test_a_lock_that_was_removed_is_nobody_s(stopped: Path) -> None:
    """Its holder's end removes the file: whoever waited for that has locked nothing."""
    log = RunLog.open(stopped, _request(stopped))
    assert log is not None
    (stopped / ".lock").unlink()
    with (stopped / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(lossk.StoreError, match="being written by another process"):
            build(stopped)
    log.close()


def _request(path: Path) -> dict[str, Any]:
    saved = read_sealed(path / "config.json")
    return {key: value for key, value in saved.items() if key not in ("chosen", "checksums")}


def test_finished_between_the_look_and_the_lock(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second starter that has found a run unfinished, and locks it once another has finished it, changes nothing."""
    request, made = _request(stopped), []
    take = lossk.accumulate.runlog.Lock

    def late(store: Path) -> Any:
        if not made:
            made.append(1)
            build(stopped)
        return take(store)

    monkeypatch.setattr(lossk.accumulate.runlog, "Lock", late)
    with pytest.raises(lossk.StoreError, match=r"k\.lossk.* has been finished by another process"):
        RunLog.open(stopped, request)
    assert verify_store(stopped).ok


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named(path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def none(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", none)
        with pytest.raises(lossk.StoreError, match=r"k\.lossk.* file system without locks .*write it on another"):
            build(path)
        kernel_of(0).save(path)  # nobody else resumes what is saved in one step
    assert verify_store(path).ok


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("kind", ["tiles", "stored factor"])
def test_a_store_that_is_replaced_is_not_mixed(path: Path, kind: str, earlier: bool) -> None:
    """Tiles of one kernel with the moments of another would be a silent wrong answer."""
    other = lossk.LossTraces(2 * losses()[:, ::-1].copy())
    if kind == "tiles":
        build(path)
    else:
        lossk.LossTraces(losses()).save(path)
    if earlier:
        as_before(path)
    opened = lossk.open(path)
    lossk.LossKernel.from_traces(other).save(path, overwrite=True)
    with pytest.raises(lossk.StoreError, match=r"k\.lossk.* was replaced while it was open"):
        opened[:]
    assert torch.equal(lossk.open(path)[:], lossk.LossKernel.from_traces(other)[:])


def test_reading_while_others_replace(path: Path) -> None:
    """Every open sees one of the two, whole, and none fails."""
    kernels = [kernel_of(0), kernel_of(1)]
    expected = [kernel[:] for kernel in kernels]
    kernels[0].save(path)
    done = threading.Event()

    def replace() -> None:
        for number in range(12):
            kernels[number % 2].save(path, overwrite=True)
        done.set()

    writer = threading.Thread(target=replace)
    writer.start()
    seen = 0
    while not done.is_set() or seen == 0:
        found = lossk.open(path)[:]
        assert any(torch.equal(found, each) for each in expected)
        seen += 1
    writer.join()


@pytest.mark.parametrize("swapped", [False, True])
def test_what_was_moved_aside_comes_back(path: Path, swapped: bool) -> None:
    """Where folders cannot change places: killed between two moves, the old one is there again when it is asked for."""
    if swapped:
        kernel_of(1).save(path)
    kernel_of(0).save(path.with_name("old"))
    path.with_name("old").rename(path.with_name(f".{path.name}.1234567.old"))
    found = lossk.open(path)[:]
    assert torch.equal(found, kernel_of(int(swapped))[:])
    kernel_of(1).save(path, overwrite=True)
    assert [entry.name for entry in path.parent.iterdir()] == ["k.lossk"]


# --- disks that fail -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("call", ["write", "fsync", "mkdir"])
@pytest.mark.parametrize("write", ["save", "traces", "run", "zarr", "npy"])
def test_a_failure_names_its_file_and_leaves_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: str, write: str
) -> None:
    kernel, original = kernel_of(0), getattr(os, call)
    if write == "npy" and call in ("mkdir", "write"):
        call, original = "pwrite", os.pwrite

    def fail(*arguments: Any, **options: Any) -> Any:
        place = arguments[0] if isinstance(arguments[0], str | Path) else os.readlink(f"/proc/self/fd/{arguments[0]}")
        if str(path.parent) in str(place):
            raise OSError(number, os.strerror(number))
        return original(*arguments, **options)

    work: dict[str, Callable[[], Any]] = {
        "save": lambda: kernel.save(path),
        "traces": lambda: lossk.LossTraces(losses()).save(path),
        "run": lambda: build(path),
        "zarr": lambda: kernel.to_zarr(path),
        "npy": lambda: kernel.to_memmap(path),
    }
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(lossk.StoreError, match=r"k\.lossk.* cannot be written: .*" + os.strerror(number)):
            work[write]()
    assert not list(path.parent.iterdir())


def test_a_committed_tile_that_was_cut_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be sealed as it is, and never be resumed from; all its chunks are those of a run left alone."""
    (tmp_path / "whole").mkdir()
    out_of_core(tmp_path / "whole")
    write, count = lossk.accumulate.tile_pass.TileWriter._write, [0]

    def stopping(*arguments: Any) -> None:
        count[0] += 1
        if count[0] > 2:
            raise KeyboardInterrupt
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(lossk.accumulate.tile_pass.TileWriter, "_write", stopping)
        with pytest.raises(KeyboardInterrupt):
            out_of_core(tmp_path)
    tile = sorted((tmp_path / NAME / "tiles" / "c").rglob("?/?"))[0]
    tile.write_bytes(tile.read_bytes()[:-9])
    out_of_core(tmp_path)
    assert arrays(tmp_path / NAME) == arrays(tmp_path / "whole" / NAME)
    assert verify_store(tmp_path / NAME).ok
