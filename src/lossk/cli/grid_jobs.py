"""Running the cells of a grid, several at a time: a cell's result is written as soon as it is there."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from lossk.cli.config import RunConfig
from lossk.cli.grid_cell import Data, PlannedCell, grid_data, read_cell, run_cell
from lossk.disk.files import read_json, write_json
from lossk.disk.locks import LOCK, Lock
from lossk.errors import LosskError, StoreError
from lossk.recipes import RecipeTask
from lossk.store.store import refuse_other_run

PLAN, PICTURE = "grid.json", "grid.png"
_job: dict[str, Any] = {}  # of a job's process: its task and data, made once


@contextlib.contextmanager
def working_in(folder: Path, *, resume: bool, overwrite: bool) -> Iterator[None]:
    """Nobody else works in the folder meanwhile. A grid that never began leaves nothing behind.

    Raises:
        FileExistsError: the folder holds a grid, and neither `resume` nor `overwrite` is set.
        StoreError: it holds something else, or another process works in it.
    """
    began = (folder / PLAN).exists()
    if not began and folder.exists() and any(path.name != LOCK for path in folder.iterdir()):
        raise StoreError(f"{str(folder)!r} is not a folder of lossk tune; it will not be written to")
    if began and not (resume or overwrite):
        raise FileExistsError(f"{folder} exists; pass --resume to continue it, --overwrite to begin again, or --out")
    folder.mkdir(parents=True, exist_ok=True)
    lock = Lock(folder)
    try:
        yield
    finally:
        (folder / LOCK).unlink()
        lock.release()
        if not (folder / PLAN).exists():
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()


def open_grid(
    folder: Path, request: Mapping[str, Any], given: Mapping[str, Any], make: Callable[[], dict[str, Any]], *,
    overwrite: bool,
) -> dict[str, Any]:  # fmt: skip
    """The plan in a folder: the one that is there, when it is of the same request, or a new one from `make`.

    Raises:
        StoreError: the folder holds another request; the difference is shown.
    """
    if overwrite:
        for path in [*folder.glob("n_beta=*"), folder / PICTURE, folder / PLAN]:
            path.unlink(missing_ok=True)
    if not (folder / PLAN).exists():
        write_json(folder / PLAN, make())
    grid = read_json(folder / PLAN)
    refuse_other_run(folder, grid["request"], request)
    if grid["given"] == given:
        return grid
    again = make()  # other cells were asked for: finished ones that are among them are kept
    if again["fingerprints"] != grid["fingerprints"]:
        raise StoreError("the task gives another model or other data than when the grid began; use --overwrite")
    write_json(folder / PLAN, again)
    return again


def run_grid(
    folder: Path, config: RunConfig, grid: Mapping[str, Any], cells: list[PlannedCell], *, jobs: int,
    finished: Callable[[PlannedCell, dict[str, Any]], None],
) -> list[dict[str, Any]]:  # fmt: skip
    """Make every cell's result that is not there, and give all of them, in the order of `cells`.

    Each job has one torch thread. `finished(cell, result)` is told of every cell that this call made.

    Raises:
        LosskError: what went wrong in a job; results that other jobs had finished are written.
    """
    results = {cell.name: result for cell in cells if (result := read_cell(folder, cell, grid)) is not None}
    todo = sorted((cell for cell in cells if cell.name not in results), key=lambda cell: -cell.seconds)
    for cell, result in _made(config, grid, todo, min(jobs, len(todo))):
        write_json(folder / f"{cell.name}.json", result)
        results[cell.name] = result
        finished(cell, result)
    return [results[cell.name] for cell in cells]


def _made(
    config: RunConfig, grid: Mapping[str, Any], todo: list[PlannedCell], jobs: int
) -> Iterator[tuple[PlannedCell, dict[str, Any]]]:
    """(cell, result) of each, as soon as it is there."""
    if not todo:
        return
    if jobs == 1:
        with _one_thread():
            task, data = _prepare(config, grid)
            for cell in todo:
                yield cell, run_cell(cell, grid, task, data)
        return
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_end_with_parent) as pool:
        asked = {pool.submit(_run_in_job, config, grid, cell): cell for cell in todo}
        try:
            for future in as_completed(asked):
                yield asked[future], _result(future)
        except BaseException:
            _stop(pool)
            raise


def _prepare(config: RunConfig, grid: Mapping[str, Any]) -> tuple[RecipeTask, Data]:
    task = config.make_task()
    return task, grid_data(task, grid["request"]["probe"])


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _result(future: Future[dict[str, Any]]) -> dict[str, Any]:
    try:
        return future.result()
    except BrokenExecutor as error:
        raise LosskError(f"a job died ({error})") from error
    except Exception as error:
        raise LosskError(f"{type(error).__name__} in a job: {error}") from error


def _stop(pool: Executor) -> None:
    """End the jobs in the middle of their cells: what they have not finished is made again."""
    pool.shutdown(wait=False, cancel_futures=True)
    for process in multiprocessing.active_children():
        process.terminate()


def _end_with_parent() -> None:
    """In a job: end when the process that started it is gone, however it went; and leave Ctrl-C to it."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _run_in_job(config: RunConfig, grid: Mapping[str, Any], cell: PlannedCell) -> dict[str, Any]:
    """In a job, which makes its task once."""
    with _one_thread():
        if not _job:
            _job["task"], _job["data"] = _prepare(config, grid)
        return run_cell(cell, grid, _job["task"], _job["data"])
