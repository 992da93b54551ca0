"""Losses of power, simulated: what a disk may hold after any change, taken up again: `power_loss.py FOLDER [EVERY]`.

A run is watched, and a model of the disk follows it (`file_events.Disk`), once strictly by POSIX and once as most file
systems have it, where the sync of a file keeps its name. After a change, what is left may be: what was synced, and
nothing else; everything; all names, and of the files what was synced; or of each folder and each file any of what it
was since its last sync, by chance. Each such state that differs is taken up again, and must end as a run left alone.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from file_events import Disk, Event, watched
from kill_sweep import again, in_fork, warm_up
from sweep_kinds import KINDS, prepare

RUNS = ("in_memory", "out_of_core", "factor")

first = lambda versions: versions[0]  # noqa: E731
last = lambda versions: versions[-1]  # noqa: E731


def torn(rng: random.Random) -> Callable[[list[bytes]], bytes]:
    """Of a file's contents since its last sync one; of what was added to it, perhaps a part, perhaps zeros."""

    def choose(versions: list[bytes]) -> bytes:
        content = rng.choice(versions)
        if len(versions) > 1 and rng.random() < 0.5:
            durable = len(versions[0]) if content.startswith(versions[0]) else 0
            kept = rng.randrange(durable, len(content) + 1)
            return content[:kept] + bytes(len(content) - kept) * rng.randrange(2)
        return content

    return choose


def states(disk: Disk, target: Path, rng: random.Random) -> None:
    """Write four of the states that the disk may be in, below `target`."""
    target.mkdir()
    disk.write(target / "synced", first, first)
    disk.write(target / "all", last, last)
    disk.write(target / "names", last, first)
    disk.write(target / "chance", rng.choice, torn(rng))


def simulate(kind: str, parent: Path, every: int, start: int, *, names_too: bool) -> dict[str, Any]:
    """Lose the power after some of the changes of a run, and take up each state that is left."""
    folder, rng = parent / f"{kind}-live", random.Random(start)
    prepare(folder, kind)
    disk, count, wanted = Disk(folder, names_too=names_too), [0], parent / f"{kind}-states"
    wanted.mkdir()

    def follow(event: Event) -> None:
        disk.take(event)
        if count[0] % every == start:
            states(disk, wanted / str(count[0]), rng)
        count[0] += 1

    def run() -> None:
        with watched(folder, lambda event: None, follow, sync=False):
            KINDS[kind](folder)
        raise SystemExit(count[0])

    _, said = in_fork(run)
    assert said.startswith("SystemExit: "), said
    found: dict[str, Any] = {"kind": kind, "names_too": names_too, "events": int(said.split()[1]), "states": 0}
    seen: set[tuple[Any, ...]] = set()
    faults = []
    for number, state in [(at.name, state) for at in sorted(wanted.iterdir()) for state in sorted(at.iterdir())]:
        content = fingerprint(state)
        if content in seen:
            continue
        seen.add(content)
        found["states"] += 1
        _, said = in_fork(lambda: again(kind, state, folder))  # noqa: B023
        if said:
            faults.append(f"{state.name} after event {number}: {said}")
    shutil.rmtree(wanted)
    shutil.rmtree(folder)
    return {**found, "same": found["states"] - len(faults), "faults": faults}


def fingerprint(folder: Path) -> tuple[Any, ...]:
    """All that lies in a folder."""
    entries = sorted(folder.rglob("*"))
    return tuple((str(e.relative_to(folder)), e.read_bytes() if e.is_file() else None) for e in entries)


def main(parent: Path, every: int) -> None:
    warm_up(parent)
    begun, results = time.perf_counter(), []
    for place, kind in enumerate(RUNS):
        for names_too in (False, True):
            results.append(simulate(kind, parent, every, (place + 2 * names_too) % every, names_too=names_too))
            print(json.dumps(results[-1]), flush=True)
    states_, same = (sum(found[key] for found in results) for key in ("states", "same"))
    print(f"{states_} states, {same} the same afterwards, in {time.perf_counter() - begun:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1)
