"""A kill before every change to a file, of a small run of each kind: `kill_sweep.py FOLDER [EVERY [KIND...]]`.

A run is a fork of this process, which has done such work once. It counts its changes to files, and kills itself by
SIGKILL before the one that it is told, every second time that this is a write, in the middle of it. Then the same call
is made again, and what it leaves is compared with what a run left alone has left.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import lossk
from file_events import Event, before_tests, watched
from lossk.store.verify import verify_store
from sweep_kinds import EXPORTS, KINDS, NAME, arrays, kernel_of, names, prepare, prepare_source


@dataclass
class Swept:
    """What came of the kills of one kind of run; the last three are faults, by the number of the event."""

    kind: str
    events: int
    kills: int
    same: int
    raw: list[str]
    different: list[str]
    leftovers: list[str]


def in_fork(work: Callable[[], None]) -> tuple[int, str]:
    """Do something in a fork of this process; its wait status, and what it said at its end."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        said, status = "", 0
        try:
            work()
        except BaseException as error:
            said, status = f"{type(error).__name__}: {error}", 1
        finally:
            before_tests["write"](write, said.encode()[:4000])
            os._exit(status)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        told = pipe.read().decode(errors="replace")
    return os.waitpid(pid, 0)[1], told


def killed_at(number: int, kind: str, folder: Path) -> None:
    """A run that ends before its event of that number."""
    left = [number]

    def before(event: Event) -> None:
        left[0] -= 1
        if left[0] >= 0:
            return
        if event.name == "write" and number % 2 and len(event.content) > 1:
            with open(event.path, "ab" if event.path.name.endswith(".jsonl") else "r+b") as file:
                file.write(event.content[: len(event.content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    with watched(folder, before, sync=False):
        KINDS[kind](folder)


def count_events(kind: str, folder: Path) -> int:
    """How many there are; left alone, in a fork."""
    prepare(folder, kind)
    counted: list[str] = []

    def run() -> None:
        with watched(folder, lambda event: counted.append(event.name), sync=False):
            KINDS[kind](folder)
        raise SystemExit(len(counted))

    _, said = in_fork(run)
    assert said.startswith("SystemExit: "), said
    return int(said.removeprefix("SystemExit: "))


def readable(kind: str, path: Path, new: Path) -> None:
    """Before anything is done about a kill: what is there opens, or says that it does not; one of two is there."""
    try:
        found = lossk.open(path)
    except lossk.StoreError:
        if "_over" in kind:
            raise
        return
    if "_over" in kind:
        assert any(torch.equal(found[:], each[:]) for each in (kernel_of(0.5), lossk.open(new))), "not old and not new"
    else:
        found[:]


def again(kind: str, folder: Path, reference: Path) -> None:
    """Make the call again, and compare what it leaves."""
    path = folder / NAME
    if kind not in {export.__name__ for export in EXPORTS} and path.exists():
        try:
            verify_store(path)
        except lossk.StoreError:
            assert not (path / "zarr.json").exists()
    if kind not in {export.__name__ for export in EXPORTS}:
        readable(kind, path, reference / NAME)
    KINDS[kind](folder)
    assert arrays(path) == arrays(reference / NAME), "different"
    if kind not in {export.__name__ for export in EXPORTS}:
        lossk.open(path)[:]
        found = verify_store(path)
        assert found.ok, f"different: {found.problems}"
    assert names(folder) == names(reference), f"leftovers: {sorted(names(folder) ^ names(reference))}"


def sweep(kind: str, parent: Path, every: int = 1, first: int = 0) -> Swept:
    """Kill it before its events number `first`, `first` + `every`, ..."""
    reference = parent / f"{kind}-reference"
    events = count_events(kind, reference)
    found = Swept(kind, events, 0, 0, [], [], [])
    for number in range(first, events, every):
        folder = parent / f"{kind}-{number}"
        prepare(folder, kind)
        status, said = in_fork(lambda: killed_at(number, kind, folder))  # noqa: B023
        assert os.WIFSIGNALED(status), f"{kind}: not killed at {number} of {events}: {said}"
        found.kills += 1
        _, said = in_fork(lambda: again(kind, folder, reference))  # noqa: B023
        if not said:
            found.same += 1
        elif "leftovers" in said:
            found.leftovers.append(f"{number}: {said}")
        else:
            (found.different if "different" in said else found.raw).append(f"{number}: {said}")
        shutil.rmtree(folder)
    return found


def warm_up(parent: Path) -> None:
    """One run of all that forks will do, so that they need not import it, each anew."""
    torch.set_num_threads(1)
    prepare_source(parent)
    for kind in ("in_memory", "traces"):
        prepare(parent / f"{kind}-first", kind)
        KINDS[kind](parent / f"{kind}-first")
        verify_store(parent / f"{kind}-first" / NAME)
        shutil.rmtree(parent / f"{kind}-first")
    gc.freeze()  # a fork then copies none of it


def main(parent: Path, every: int, kinds: list[str]) -> None:
    os.fsync = lambda descriptor: None  # a kill loses nothing that was written; what syncs are for, power_loss.py shows
    warm_up(parent)
    start, results = time.perf_counter(), []
    for place, kind in enumerate(kinds or KINDS):
        results.append(sweep(kind, parent, every, place % every))
        print(json.dumps(asdict(results[-1])), flush=True)
    print(
        f"{len(results)} kinds of runs, {sum(r.events for r in results)} events, {sum(r.kills for r in results)} "
        f"killed, {sum(r.same for r in results)} the same afterwards, in {time.perf_counter() - start:.0f} s",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1, sys.argv[3:])
