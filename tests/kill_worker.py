"""Runs that are killed with SIGKILL, and resumed: `kill_worker.py FOLDER SEED KIND...`, one kill for each kind.

Every run is a fork of this process, which has done nothing but import: a run then costs a second, not ten.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lossk
import lossk.accumulate.runlog
import lossk.accumulate.tile_pass
import lossk.accumulate.tiles
import lossk.disk.chunks
import lossk.ops.rank_update
import lossk.run.cost
from lossk.accumulate.runlog import RunLog
from lossk.disk.files import part_of
from lossk.plan.layout import in_store
from lossk.store.commits import Commit


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def build(path: Path, tiles: str) -> None:
    """BAOAB, whose momenta are state; 2 x 12 draws of 300 samples by panels of 3; 15 tiles, or a factor of 5 chunks."""
    torch.set_num_threads(1)
    if tiles == "store":
        lossk.run.cost.choose_layout = lambda size, _, taken, **__: in_store(
            size, taken, super_panel=size.draws, stripes=2
        )
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(300, 4, generator=generator), torch.arange(300) % 3
    model = nn.Linear(4, 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    sampler = lossk.BAOAB(
        n_beta=30.0, localization=5.0, step_size=0.01, friction=20.0, num_burnin_steps=5, num_steps_bw_draws=3,
        batch_size=16,
    )  # fmt: skip
    lossk.build_kernel(
        model, data, sampler=sampler, num_chains=2, num_draws=12, tile=64, panel=3, backend="torch", out=path,
        passes=lossk.Passes(), resume=True, progress=False, form="factor" if tiles == "factor" else "tiles",
    )  # fmt: skip


class Nth:
    """Calls `act` instead of a function at its call number `at`."""

    def __init__(self, function: Callable[..., Any], at: int, act: Callable[..., None]) -> None:
        self.function, self.left, self.act = function, at, act

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            self.act(*args, **kwargs)
        return self.function(*args, **kwargs)


def tear(path: Path, content: bytes) -> None:
    """Half of a write, as a loss of power may leave it."""
    with path.open("ab") as file:
        file.write(content[: len(content) // 2])
    die()


def arm(kind: str, at: int) -> None:
    """Have this process killed at the event number `at` of a kind."""
    if kind in ("panel", "tile"):  # half of its chunk is written
        name, write = {"panel": "losses", "tile": "tiles"}[kind], lossk.disk.chunks.replace_file
        torn = Nth(write, at, lambda path, *content: tear(part_of(path), content[0]))
        lossk.disk.chunks.replace_file = lambda path, *content: (torn if name in path.parts else write)(path, *content)
    elif kind == "state":
        lossk.accumulate.runlog.replace_file = Nth(
            lossk.accumulate.runlog.replace_file, at, lambda path, content: tear(part_of(path), content)
        )
    elif kind == "commit":

        def torn_line(log: RunLog, new: list[Commit], **_: Any) -> None:
            tear(log.path / "commits.jsonl", json.dumps(new[0].line()).encode())

        commit = Nth(RunLog.commit, at, torn_line)
        RunLog.commit = lambda self, new, **more: commit(self, new, **more)
    elif kind == "update":  # between two tiles that a panel goes into
        lossk.accumulate.tiles.rank_update = Nth(lossk.accumulate.tiles.rank_update, at, lambda *_: die())
    elif kind == "product":  # between two tiles that are made from the log
        lossk.accumulate.tile_pass.add_rows = Nth(lossk.accumulate.tile_pass.add_rows, at, lambda *_: die())
    elif kind == "sync":
        os.fsync = Nth(os.fsync, at, lambda _: die())
    elif kind != "time":
        raise ValueError(kind)


NUMBER = {"panel": 8, "state": 6, "commit": 8, "update": 100, "product": 15, "tile": 15, "sync": 45, "time": 1}
FORMS = ("memory", "store", "factor")
PLACES = {"update": ("memory",), "product": ("store",), "tile": ("store",)}


def in_fork(work: Callable[[], None], kill_after: float | None = None) -> int:
    """Do something in a fork of this process; returns its wait status. Perhaps killed before it is done."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def arrays(path: Path) -> dict[str, bytes]:
    """Every chunk of a store."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.glob("*/c/**/*")) if file.is_file()}


def attempt(folder: Path, kind: str, number: int, rng: random.Random, seconds: dict[str, float]) -> dict[str, Any]:
    """One run, killed once, resumed, and compared."""
    for again in range(20):  # a kill that comes too late is tried again, sooner
        tiles = rng.choice(PLACES.get(kind, FORMS))
        path = folder / f"{number}-{again}.lossk"
        at = rng.randrange(max(NUMBER[kind] >> again // 4, 1))
        after = rng.uniform(0, seconds[tiles] / (1 + again)) if kind == "time" else None

        def killed(path: Path = path, tiles: str = tiles, at: int = at) -> None:
            arm(kind, at)
            build(path, tiles)

        if os.WIFSIGNALED(in_fork(killed, after)):
            break
    else:
        raise AssertionError(f"{kind} never struck")
    early = (path / "complete").exists()
    status = in_fork(lambda: build(path, tiles))
    same = status == 0 and arrays(path) == arrays(folder / f"{tiles}.lossk")
    return {"kind": kind, "at": at if after is None else after, "tiles": tiles, "complete": early, "same": same}


def main(folder: Path, seed: int, kinds: Sequence[str]) -> None:
    rng, seconds, found = random.Random(seed), {}, []
    for tiles in FORMS:
        start = time.perf_counter()
        assert in_fork(lambda tiles=tiles: build(folder / f"{tiles}.lossk", tiles)) == 0
        seconds[tiles] = time.perf_counter() - start
        assert len(arrays(folder / f"{tiles}.lossk")) > (15 if tiles == "factor" else 25)
    for number, kind in enumerate(kinds):
        found.append(attempt(folder, kind, number, rng, seconds))
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
