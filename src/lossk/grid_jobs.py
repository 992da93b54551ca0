"""Running the cells of a grid: several processes, and several invocations, share one folder's work.

A worker claims a cell by a lock on the cell's `.claim` file, which the system lets go of when the worker ends, however
it ends. Who holds the claim and finds no result makes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from lossk.config import RunConfig
from lossk.disk import read_json, write_json
from lossk.errors import LosskError, StoreError
from lossk.grid_cell import PlannedCell, grid_data, read_cell, run_cell
from lossk.store import refuse_other_run

POLL_SECONDS = 0.2
PLAN, PICTURE = "grid.json", "grid.png"


@contextlib.contextmanager
def hold(path: Path, *, shared: bool = False, wait: bool = False) -> Iterator[bool]:
    """Hold a lock on a file; gives False, at once, where another process has it (unless told to wait)."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def open_grid(
    folder: Path, request: Mapping[str, Any], given: Mapping[str, Any], make: Callable[[], dict[str, Any]], *,
    resume: bool, overwrite: bool,
) -> dict[str, Any]:  # fmt: skip
    """The plan in a folder: the one that is there, when it is of the same request, or a new one from `make`.

    Raises:
        FileExistsError: the folder is taken, and neither `resume` nor `overwrite` is set.
        StoreError: it is not a grid's, it holds another request (the difference is shown), or, with `overwrite`,
            someone is working in it.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / PLAN).exists() and not (folder / ".plan").exists():
        raise StoreError(f"{str(folder)!r} is not a folder of lossk tune; it will not be written to")
    if (folder / PLAN).exists() and not (resume or overwrite):
        raise FileExistsError(f"{folder} exists; pass --resume to continue it, --overwrite to begin again, or --out")
    folder.mkdir(parents=True, exist_ok=True)
    with hold(folder / ".plan", wait=True):
        if overwrite:
            _clear(folder)
        if not (folder / PLAN).exists():
            try:
                write_json(folder / PLAN, make())
            except BaseException:
                _leave(folder)
                raise
        grid = read_json(folder / PLAN)
        refuse_other_run(folder, grid["request"], request)
        if grid["given"] == given:
            return grid
        again = make()  # other cells were asked for: finished ones that are among them are kept
        if again["fingerprints"] != grid["fingerprints"]:
            raise StoreError("the task gives another model or other data than when the grid began; use --overwrite")
        write_json(folder / PLAN, again)
        return again


def _leave(folder: Path) -> None:
    """A grid that never began leaves nothing behind."""
    (folder / ".plan").unlink()
    with contextlib.suppress(OSError):  # not empty
        folder.rmdir()


def _clear(folder: Path) -> None:
    with hold(folder / ".working") as alone:
        if not alone:
            raise StoreError(f"{str(folder)!r} is being worked on by another process")
        for path in folder.glob("n_beta=*"):
            path.unlink()
        (folder / PICTURE).unlink(missing_ok=True)
        (folder / PLAN).unlink(missing_ok=True)


def run_grid(
    folder: Path, config: RunConfig, grid: Mapping[str, Any], cells: list[PlannedCell], *, jobs: int,
    finished: Callable[[PlannedCell, dict[str, Any]], None],
) -> list[dict[str, Any]]:  # fmt: skip
    """Make every cell's result that is not there, and give all of them, in the order of `cells`.

    Each job has one torch thread. `finished(cell, result)` is told of every cell that this call waited for.
    """
    results = {cell.name: result for cell in cells if (result := read_cell(folder, cell, grid)) is not None}
    todo = sorted((cell for cell in cells if cell.name not in results), key=lambda cell: -cell.seconds)

    def take(cell: PlannedCell, result: dict[str, Any]) -> None:
        results[cell.name] = result
        finished(cell, result)

    with hold(folder / ".working", shared=True, wait=True):
        if jobs == 1 or len(todo) <= 1:
            for cell, result in work(folder, config, grid, todo):
                take(cell, result)
        else:
            with _workers(folder, config, grid, todo, min(jobs, len(todo))) as check:
                while left := [cell for cell in todo if cell.name not in results]:
                    ended = check()
                    for cell in left:
                        if (folder / f"{cell.name}.json").exists() and (found := read_cell(folder, cell, grid)):
                            take(cell, found)
                    if ended and any(read_cell(folder, cell, grid) is None for cell in left):
                        raise LosskError("all jobs ended before all cells were finished")
                    time.sleep(POLL_SECONDS)
    return [results[cell.name] for cell in cells]


def work(
    folder: Path, config: RunConfig, grid: Mapping[str, Any], todo: list[PlannedCell]
) -> Iterator[tuple[PlannedCell, dict[str, Any]]]:
    """Cell by cell, each result as soon as it is there: made here, or by whoever had claimed it before."""
    task, data, left = None, None, list(todo)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        while left:
            done: list[PlannedCell] = []
            for cell in left:
                with hold(folder / f"{cell.name}.claim") as claimed:
                    result = read_cell(folder, cell, grid)
                    if result is None and claimed:
                        if task is None or data is None:  # once per process, and not when there is nothing to do
                            task = config.make_task()
                            data = grid_data(task, grid["request"]["probe"])
                        result = run_cell(cell, grid, task, data)
                        write_json(folder / f"{cell.name}.json", result)
                if result is not None:
                    done.append(cell)
                    yield cell, result
            left = [cell for cell in left if cell not in done]
            if left and not done:
                time.sleep(POLL_SECONDS)
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _workers(
    folder: Path, config: RunConfig, grid: Mapping[str, Any], todo: list[PlannedCell], jobs: int
) -> Iterator[Callable[[], bool]]:
    """Start processes; gives a function that raises what went wrong in one, and says whether all have ended."""
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    started = []
    for _ in range(jobs):
        mine, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_job, args=(theirs, os.getpid(), folder, config, grid, todo), daemon=True)
        process.start()
        theirs.close()
        started.append((process, mine))

    def check() -> bool:
        for process, pipe in started:
            if process.exitcode:
                raise LosskError(pipe.recv() if pipe.poll() else f"a job died (exit status {process.exitcode})")
        return all(process.exitcode == 0 for process, _ in started)

    try:
        yield check
    finally:
        for process, pipe in started:
            process.terminate()
            process.join()
            pipe.close()


def _job(
    pipe: Connection, parent: int, folder: Path, config: RunConfig, grid: Mapping[str, Any], todo: list[PlannedCell]
) -> None:
    try:
        for _ in work(folder, config, grid, todo):
            if os.getppid() != parent:  # killed, or the machine's owner would wonder who computes here
                return
    except KeyboardInterrupt:
        return
    except BaseException as error:
        pipe.send(f"{type(error).__name__} in a job: {error}")
        raise SystemExit(1) from None
