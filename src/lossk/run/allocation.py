"""Memory that the system refused while a call ran, said in words: what was planned, what is free, what would need less.

A plan cannot know what other processes take meanwhile, nor what a model or a dataset takes in a later call than those
that were measured. Whoever refuses memory says so in a way of its own: PyTorch by a RuntimeError of its allocator or of
its shared memory, NumPy by an error that has the array's shape, Python by a MemoryError without a word, the system by
ENOMEM, and a loader's worker that was killed for it by a signal.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lossk.available import available, gigabytes
from lossk.disk.files import SHARED
from lossk.errors import LosskError
from lossk.memory import Budget, as_setting

REFUSED = (
    "defaultcpuallocator", "can't allocate memory", "cannot allocate memory", "unable to allocate", "unable to mmap",
    "bad_alloc", "out of memory", "not enough memory", "killed by signal: killed",
)  # fmt: skip
OF_SHARED = ("shared memory", "</torch_")  # PyTorch's files in it have such names
OF_WORKERS = "bus error"  # of a worker that found shared memory full
WORDLESS = "failed: memoryerror"  # the end of what is told of a worker's
OTHERWISE = ("static tls",)  # of a library that cannot be loaded


class ShortageError(MemoryError):
    """Memory was refused; the message has the sizes."""


@contextmanager
def shortage_named(budget: Budget | None = None) -> Iterator[None]:
    """Say in an error of memory that was refused what the call had planned, and what is free.

    An error of this package, and a MemoryError that has words of its own, stay as they are; so does that of a device.

    Raises:
        MemoryError: instead of whatever said so.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if isinstance(error, LosskError | ShortageError | torch.OutOfMemoryError):
            raise
        found = next((each for each in _causes(error) if _is_shortage(each)), None)
        if found is None:
            raise
        raise ShortageError(_in_words(error, found, budget)) from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it was raised from, each once."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__


def _is_shortage(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError):
        return False
    said = str(error).lower()
    if isinstance(error, MemoryError) and (type(error) is not MemoryError or not said or said.endswith(WORDLESS)):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    refused = any(text in said for text in (*REFUSED, *OF_SHARED, OF_WORKERS))
    return refused and not any(text in said for text in ("cuda", *OTHERWISE))


def _in_words(error: BaseException, found: BaseException, budget: Budget | None) -> str:
    said = " ".join((str(error) or str(found) or type(found).__name__).split())
    text = f"{said} {found}".lower()
    planned = "" if budget is None else f"{_planned(budget)}, and "
    if any(part in text for part in (*OF_SHARED, OF_WORKERS)) and SHARED.is_dir():
        free = gigabytes(shutil.disk_usage(SHARED).free)
        return (
            f"shared memory ran out: {said}; {planned}{SHARED} has {free} free: a DataLoader's workers pass their "
            "batches through it; give it num_workers=0, or make room"
        )
    return (
        f"memory ran out: {said}; {planned}{available().in_words()}; what would need less: fewer samples or draws, a "
        "smaller tile, passes= with smaller batches, a loader with fewer workers, fewer other processes"
    )


def _planned(budget: Budget) -> str:
    """What the call was allowed and had planned."""
    asked = "" if budget.asked is None else f" of memory={as_setting(budget.asked)!r}"
    plan = budget.planned()
    return f"nothing{asked} was planned yet" if plan is None else f"at most {gigabytes(plan)}{asked} was planned"
