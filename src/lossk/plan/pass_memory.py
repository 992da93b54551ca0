"""What the passes of a run take of host memory, measured on a few samples, and batches that fit."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lossk.available import gigabytes
from lossk.curvature.curvature import BATCH
from lossk.data.data import Samples
from lossk.memory import Budget, as_setting
from lossk.plan.layout import SLACK
from lossk.task.passes import Passes
from lossk.task.task import Task, fitting_batch

if TYPE_CHECKING:
    from lossk.ranks.world import World

LITTLE = 64_000  # bytes of vectors and passes that are left to the plan to refuse, which says more
SHARE = 4  # a pass may take a quarter of what is left for the call
FEW, MORE = 2, 6  # samples of the passes that the memory of any other batch follows from: it grows by as much for each


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made inside, those that autograd keeps included, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {_storage_of(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.device.type == "cpu" and leaf.layout == torch.strided:
                self._note(leaf, given)
        return out

    def _note(self, tensor: Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen or key in given:  # a view, or written in place
            return
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        self._seen[key] = weakref.finalize(storage, self._forget, key, size)
        self._seen[key].atexit = False

    def _forget(self, key: int, size: int) -> None:
        self._seen.pop(key, None)
        self.now -= size


def _storage_of(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata) if tensor.layout == torch.strided else 0


def peak_of(work: Callable[[], Any]) -> int:
    """Bytes of tensors that `work` holds at its peak, beyond those that were there before."""
    with LiveBytes() as live:
        work()
    return live.peak


def pass_bytes(task: Task, probe: Samples, train: Samples, minibatch: int) -> int:
    """What the larger of a probe pass and a gradient takes in host memory with the passes of an entered task."""
    if task.device.type != "cpu":
        return 0
    probing, stepping = _slopes(task, probe, train)
    positions = task.loss.positions
    rows = min(fitting_batch(task.passes.probe_batch, positions), len(probe))
    parts = min(fitting_batch(task.passes.gradient_batch, positions), max(minibatch, min(BATCH, len(train))))
    return max(_at(probing, rows), _at(stepping, parts))


def fit_passes(
    task: Task, probe: Samples, train: Samples, minibatch: int, budget: Budget, vectors: float, given: Passes | None
) -> list[str]:
    """Have the task, not entered yet, run batches that take at most a quarter of what is left for the call; says why.

    Args:
        vectors: of all weights, that the run holds beside a pass at its peak, in float32.
        given: the passes that the caller wants, which are not changed.

    Raises:
        MemoryError: the vectors do not fit, or a single sample, or the given batches.
    """
    if task.device.type != "cpu":
        return []
    taken, held = budget.taken(), int(4 * vectors * task.num_weights)
    left = max(budget.limit(taken) - taken - SLACK, LITTLE)
    if held > left:
        raise MemoryError(
            f"the pilot and the chains hold up to {vectors:g} vectors of {task.num_weights} weights, "
            f"{gigabytes(held)}, and {gigabytes(left)} are left for the call; it needs more than "
            f"memory={as_setting(taken + held + SLACK)!r}, or a sampler with params=, which samples fewer weights"
        )
    left -= held
    with task:
        probing, stepping = _slopes(task, task.place(_some(probe)), task.place(_some(train)))
    found, reasons = {}, []
    for name, line, most in (("probe_batch", probing, len(probe)), ("gradient_batch", stepping, minibatch)):
        batch = min(getattr(given or task.passes, name), most)
        least = batch if given is not None else 1
        if _at(line, least) > left:
            share = 1 if given is not None else SHARE
            subject = f"{name}={batch} of passes=" if given is not None else "a pass of a single sample"
            raise MemoryError(
                f"{subject} takes {gigabytes(_at(line, least))}, and {gigabytes(left)} are left for the "
                f"call; it needs at least memory={as_setting(taken + held + SLACK + share * _at(line, least))!r}"
            )
        if given is None and _at(line, batch) > left // SHARE:
            while batch > 1 and _at(line, batch) > left // SHARE:
                batch //= 2
            found[name] = batch
            reasons.append(f"passes = {name} {batch}: a pass takes {gigabytes(_at(line, batch))} of {gigabytes(left)}")
    task.use_passes(dataclasses.replace(task.passes, **found))
    return reasons


def fit_together(task: Task, world: World, fit: Callable[[], list[str]]) -> list[str]:
    """The same by every rank of a run: the batches that fit on each of them.

    Args:
        fit: `fit_passes` of this rank.

    Raises:
        MemoryError: on every rank, where it is raised on one.
    """
    reasons = world.together(fit)
    every = world.gather_json([task.passes.probe_batch, task.passes.gradient_batch])
    probe, gradient = (min(batches) for batches in zip(*every, strict=True))
    task.use_passes(dataclasses.replace(task.passes, probe_batch=probe, gradient_batch=gradient))
    return reasons


Line = tuple[int, int]  # bytes without any sample, and for each


def _slopes(task: Task, probe: Samples, train: Samples) -> tuple[Line, Line]:
    """Of a probe pass and of a gradient."""
    every = torch.arange(min(MORE, len(train)), device="cpu")

    def probing(count: int) -> int:
        return peak_of(lambda: task.rows(probe[:count]))

    def stepping(count: int) -> int:
        return peak_of(partial(task.gradient, train, every[:count]))

    return _line(probing, min(MORE, len(probe))), _line(stepping, len(every))


def _some(samples: Samples) -> Samples:
    count = min(MORE, len(samples))
    return samples.cut(slice(0, count))


def _line(measure: Callable[[int], int], most: int) -> Line:
    few = min(FEW, most)
    low, high = measure(few), measure(most)
    each = max(high - low, 0) // max(most - few, 1) or -(-high // most)
    return max(high - each * most, 0), each


def _at(line: Line, batch: int) -> int:
    return line[0] + line[1] * batch
