"""Which calls of frozen modules depend on no sampled weight, and what else reads what they give: found and proven.

The loss of a few samples is run while every operation is watched: what reads a sampled weight, or what comes of one,
follows sampled weights, indices and masks included. A call whose arguments do not is kept, unless the code has read a
number that does before. What is found is tried at moved weights: the losses and the gradient must be those of the whole
model, bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lossk.data.data import Samples, few_of
from lossk.task.frozen import Call, Frozen, Key, Part, emptied, instead, tensors_of
from lossk.task.gradient_check import MOVED, moved
from lossk.task.losses import Loss
from lossk.task.prefix import NoCut
from lossk.task.task import Task

FEW = 4  # samples of a batch that calls are found with


def find_frozen(task: Task, samples: Samples) -> Frozen:
    """The calls that a pass can do without; the task is entered, at w*.

    Raises:
        NoCut: there is none, or a pass without them does not give what the whole model gives.
    """
    index = few_of(samples, FEW)
    if len(index) < 2:
        raise NoCut("a single sample does not show where samples are")
    calls, outputs = _found(task, samples, index)
    if not any(any(True for _ in call.module.parameters()) for call in calls.values()):
        raise NoCut("no module with weights lies before the sampled weights")
    read = _read(task, samples[index], Frozen(calls), outputs)
    frozen = Frozen({key: _with_live(call, read[key]) for key, call in calls.items()})
    _prove(task, samples, index, frozen)
    return frozen


def _candidates(task: Task) -> dict[int, tuple[str, nn.Module]]:
    sampled = {id(parameter) for parameter in task.sampled}
    return {
        id(module): (name, module)
        for name, module in task.model.named_modules()
        if name
        and not isinstance(module, torch.jit.ScriptModule)
        and not any(id(parameter) in sampled for parameter in module.parameters())
    }


def _found(task: Task, samples: Samples, index: Tensor) -> tuple[dict[Key, Call], dict[Key, Any]]:
    """The outermost calls that depend on no sampled weight, and what they give for these samples."""
    candidates = _candidates(task)
    while True:
        first, wrong = _record(task, samples[index], candidates)
        second, also = _record(task, samples[index[:-1]], candidates)
        if first.keys() != second.keys():
            raise NoCut("modules are not called alike in every batch")
        calls: dict[Key, Call] = {}
        for key, output in first.items():
            try:
                parts = _parts(tensors_of(output), tensors_of(second[key]), len(index))
                calls[key] = Call(*candidates[key[0]], emptied(output), parts)
            except NoCut:
                wrong.add(key[0])
        if not wrong | also:
            return calls, first
        candidates = {key: value for key, value in candidates.items() if key not in wrong | also}


def _record(task: Task, batch: Any, candidates: Mapping[int, tuple[str, nn.Module]]) -> tuple[dict[Key, Any], set[int]]:
    """What the calls gave; and modules that reach sampled weights some other way, or give what cannot be kept."""
    outputs: dict[Key, Any] = {}
    wrong: set[int] = set()
    follows = _Follows(task.sampled)

    def note(key: Key, run: Any, arguments: Any) -> Any:
        if follows.any(arguments):
            return run(alone=False)
        output = run(alone=True)
        if follows.any(output):
            wrong.add(key[0])
        outputs[key] = output
        return output

    modules = [module for _, module in candidates.values()]
    with torch.no_grad(), task.autocast(), follows, instead(modules, note):
        task.loss.evaluate(task.network, batch)
    for key, output in outputs.items():
        try:
            emptied(output)
        except NoCut:
            wrong.add(key[0])
    return {key: output for key, output in outputs.items() if key[0] not in wrong}, wrong


class _Follows(TorchDispatchMode):
    """Knows which tensors follow sampled weights, by their memory."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __init__(self, sampled: Sequence[Tensor]) -> None:
        super().__init__()
        self.number_read = False  # whether the code knows a number that follows sampled weights
        self._memory = {_memory(parameter) for parameter in sampled}
        self._alive: list[Tensor] = []  # so that no other tensor gets the memory of one that follows

    def any(self, tree: Any) -> bool:
        """Whether anything in it may follow sampled weights, also what an object holds."""
        found = self.number_read
        for leaf in tree_leaves(tree):
            held = [leaf] if isinstance(leaf, Tensor) else tree_leaves(list(getattr(leaf, "__dict__", {}).values()))
            found = found or any(_memory(each) in self._memory for each in held if _is_strided(each))
        return found

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if _is_strided(leaf)]
        if not any(_memory(leaf) in self._memory for leaf in given):
            return output
        written = given if function._schema.is_mutable else []
        for leaf in (*written, *tree_leaves(output)):
            if _is_strided(leaf):
                self._memory.add(_memory(leaf))
                self._alive.append(leaf)
            elif isinstance(leaf, bool | int | float | complex):
                self.number_read = True
        return output


def _is_strided(item: Any) -> bool:
    return isinstance(item, Tensor) and item.layout == torch.strided


def _parts(first: list[Tensor], second: list[Tensor], count: int) -> tuple[Part, ...]:
    """Where samples are in outputs for `count` samples, and for one fewer.

    Raises:
        NoCut: that cannot be seen.
    """
    return tuple(_part(a, b, count) for a, b in zip(first, second, strict=True))


def _part(a: Tensor, b: Tensor, count: int) -> Part:
    if a.ndim != b.ndim or a.layout != torch.strided or a.dtype != b.dtype:
        raise NoCut("outputs differ in form from batch to batch")
    dims = [dim for dim in range(a.ndim) if a.shape[dim] != b.shape[dim]]
    if not dims and torch.equal(a, b):
        return Part(a.detach().clone(), None)
    if len(dims) == 1:
        each, rest = divmod(a.shape[dims[0]], count)
        if rest == 0 and b.shape[dims[0]] == each * (count - 1) and (each == 1 or dims[0] == 0):
            return Part(a.detach(), dims[0], each)
    raise NoCut("outputs do not hold one row a sample")


# --- what is read ------------------------------------------------------------------------------------------------


class _Readers(TorchDispatchMode):
    """Notes which memory any operation reads or writes."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __init__(self) -> None:
        super().__init__()
        self.read: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs or {})):
            if _is_strided(leaf):
                self.read.add(_memory(leaf))
        return function(*args, **(kwargs or {}))


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _read(task: Task, batch: Any, frozen: Frozen, outputs: Mapping[Key, Any]) -> dict[Key, list[bool]]:
    """Of each tensor of each call whether the rest of a pass reads it. What cannot be NaN counts as read."""
    copies = {key: [tensor.detach().clone() for tensor in tensors_of(output)] for key, output in outputs.items()}
    parts = {key: [dataclasses.replace(part, dim=None) for part in call.parts] for key, call in frozen.calls.items()}
    constant = {
        key: dataclasses.replace(
            call, parts=tuple(dataclasses.replace(p, like=c) for p, c in zip(parts[key], copies[key], strict=True))
        )
        for key, call in frozen.calls.items()
    }
    played = Frozen(constant)
    modules = [call.module for call in constant.values()]
    with torch.no_grad(), task.autocast(), _Readers() as readers, instead(modules, played.playing(0, ())):
        task.loss.evaluate(task.network, batch)
    return {
        key: [
            _memory(copy) in readers.read or copy.numel() == 0 or not copy.is_floating_point() for copy in copies[key]
        ]
        for key in outputs
    }


def _with_live(call: Call, live: list[bool]) -> Call:
    parts = zip(call.parts, live, strict=True)
    return dataclasses.replace(call, parts=tuple(dataclasses.replace(part, live=each) for part, each in parts))


# --- proof -------------------------------------------------------------------------------------------------------


def _prove(task: Task, samples: Samples, index: Tensor, frozen: Frozen) -> None:
    """Raise NoCut unless losses and gradient at moved weights are those of the whole model, bit for bit."""
    with torch.no_grad(), task.autocast():
        kept = frozen.of(lambda: task.loss.evaluate(task.network, samples[index]))
    constant = [part.like for call in frozen.calls.values() for part in call.parts if part.dim is None]
    versions = [tensor._version for tensor in (*kept, *constant)]
    batch = samples[index]
    frozen.tell(batch, kept)
    try:
        with moved(task, MOVED, seed=0, whole=True):
            whole = _losses(task, task.loss, samples[index])
            found = _losses(task, frozen.loss(task.loss), batch)
    except Exception as error:  # whatever a model makes of what it is given
        raise NoCut(f"{type(error).__name__}: {error}".splitlines()[0]) from error
    if [tensor._version for tensor in (*kept, *constant)] != versions:
        raise NoCut("the rest of the model changes in place what a frozen module gives")
    if not all(torch.equal(a, b) for a, b in zip(whole, found, strict=True)):
        raise NoCut("a pass without the frozen modules does not give what the whole model gives")


def _losses(task: Task, loss: Loss, batch: Any) -> list[Tensor]:
    """The losses of a batch, and the gradient of their mean."""
    with torch.enable_grad(), task.autocast():
        losses = loss.per_sample(task.network, batch)
        gradient = torch.autograd.grad(losses.mean(), task.sampled, allow_unused=True, materialize_grads=True)
    return [losses.detach(), *gradient]
