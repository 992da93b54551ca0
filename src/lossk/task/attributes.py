"""What hangs on a model besides its parameters, held so that it can be put back: caches, flags, hooks, buffers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lossk.data.generators import KINDS, put_back

DEEPEST = 3  # plain objects within one another, below a module, that are looked into
LARGEST = 10_000  # entries of a container that is looked into
LARGEST_BYTES = 2**26  # of a tensor or an array in a plain object, which may be anything: a data set, say
_CLOSED = (str, bytes, int, float, complex, type(None), torch.dtype, torch.device, torch.Size, Enum)
_CODE = (type, ModuleType, FunctionType, BuiltinFunctionType, MethodType)
_MISSING = object()


@dataclass(frozen=True)
class _Kept:
    """One thing that may change: where it is, whether it has changed, and how to put it back."""

    name: str
    changed: Callable[[], bool]
    restore: Callable[[], object]


class Attributes:
    """The state of a model's modules but for the values of its parameters: to be put back exactly.

    Held are, of every module: its attributes, and so its mode, hooks, buffers and submodules; what is in the lists,
    dicts, sets and plain objects that it reaches by them; the contents of tensors and arrays there; the states of
    random generators there; and the data attributes of its class. Out of reach are globals, closures and anything that
    Python code cannot see.
    """

    def __init__(self, model: nn.Module) -> None:
        self._seen: dict[int, Any] = {}  # keeps what was seen alive, so that no id is used twice
        self._kept: list[_Kept] = []
        self._parameters = {id(parameter) for parameter in model.parameters()}
        self._storages = {address(parameter) for parameter in model.parameters()}
        self._waiting: list[tuple[str, Any, int]] = []
        for name, module in model.named_modules():
            self._waiting.append((name or "model", module, 0))
        self._waiting.reverse()
        while self._waiting:
            self._look(*self._waiting.pop())

    def changed(self) -> list[str]:
        """Names of what is not as it was."""
        return [kept.name for kept in self._kept if kept.changed()]

    def restore(self) -> None:
        """Put everything back."""
        for kept in self._kept:
            if kept.changed():
                kept.restore()

    def _look(self, name: str, value: Any, depth: int) -> None:
        if isinstance(value, (*_CLOSED, *_CODE)) or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, Tensor | np.ndarray):
            if depth == 0 or value.nbytes <= LARGEST_BYTES:
                self._hold_tensor(name, value) if isinstance(value, Tensor) else self._hold_array(name, value)
        elif isinstance(value, dict | list | set | deque):
            self._hold_container(name, value, depth)
        elif isinstance(value, tuple | frozenset):
            self._wait(((f"{name}[{i}]", entry) for i, entry in enumerate(value)), len(value), depth)
        elif isinstance(value, KINDS):
            self._keep(name, lambda: True, put_back(value))
        elif isinstance(value, nn.Module):
            self._hold_class(type(value))
            self._hold_namespace(name, value, depth)
        elif depth < DEEPEST and isinstance(getattr(value, "__dict__", None), dict):
            self._hold_namespace(name, value, depth + 1)

    def _wait(self, entries: Iterator[tuple[str, Any]], count: int, depth: int) -> None:
        if count <= LARGEST:
            self._waiting.extend((name, entry, depth) for name, entry in entries if not isinstance(entry, _CLOSED))

    def _keep(self, name: str, changed: Callable[[], bool], restore: Callable[[], object]) -> None:
        self._kept.append(_Kept(name, changed, restore))

    def _hold_namespace(self, name: str, owner: Any, depth: int) -> None:
        space = vars(owner)
        self._hold_mapping(name, space)
        self._wait(((f"{name}.{key}", entry) for key, entry in space.items()), len(space), depth)

    def _hold_mapping(self, name: str, space: dict[Any, Any]) -> None:
        before = dict(space)

        def restore() -> None:
            space.clear()
            space.update(before)

        self._keep(name, lambda: not _same(space.items(), before.items()), restore)

    def _hold_container(self, name: str, value: Any, depth: int) -> None:
        if isinstance(value, dict):
            self._hold_mapping(name, value)
            entries: Iterator[tuple[str, Any]] = ((f"{name}[{key!r}]", entry) for key, entry in value.items())
        else:
            self._hold_sequence(name, value)
            entries = ((f"{name}[{i}]", entry) for i, entry in enumerate(value))
        self._wait(entries, len(value), depth)

    def _hold_sequence(self, name: str, value: list[Any] | set[Any] | deque[Any]) -> None:
        before = list(value)

        def restore() -> None:
            value.clear()
            value.update(before) if isinstance(value, set) else value.extend(before)

        self._keep(name, lambda: len(value) != len(before) or any(a is not b for a, b in zip(value, before)), restore)  # noqa: B905

    def _hold_tensor(self, name: str, tensor: Tensor) -> None:
        if id(tensor) in self._parameters or tensor.layout != torch.strided or tensor.is_meta:
            return
        data = tensor.detach()
        if address(tensor) in self._storages:
            return
        value = data.clone()

        def changed() -> bool:
            moved = tensor.shape != data.shape or tensor.dtype != data.dtype or tensor.data_ptr() != data.data_ptr()
            return moved or not _same_bits(tensor, value)

        def restore() -> None:
            with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                if tensor.shape != data.shape or tensor.data_ptr() != data.data_ptr() or tensor.dtype != data.dtype:
                    tensor.data = data
                tensor.detach().copy_(value)

        self._keep(name, changed, restore)

    def _hold_array(self, name: str, array: np.ndarray) -> None:
        if array.dtype.hasobject or not array.flags.writeable:
            return
        before = array.copy()

        def restore() -> None:
            array[...] = before

        self._keep(name, lambda: array.tobytes() != before.tobytes(), restore)

    def _hold_class(self, kind: type) -> None:
        """Data attributes of the model's own classes: caches that all instances share."""
        for each in kind.__mro__:
            if id(each) in self._seen or each.__module__.partition(".")[0] in ("torch", "builtins", "typing", "abc"):
                continue
            self._seen[id(each)] = each
            before = _data_attributes(each)
            self._keep(each.__name__, _class_changed(each, before), _class_restored(each, before))
            self._wait(((f"{each.__name__}.{key}", entry) for key, entry in before.items()), len(before), 0)


def address(tensor: Tensor) -> int:
    """Of the memory behind a tensor; its own identity where it has none."""
    try:
        return tensor.untyped_storage().data_ptr() or id(tensor)
    except (RuntimeError, NotImplementedError):
        return id(tensor)


def _same(now: Any, before: Any) -> bool:
    return len(now) == len(before) and all(a[0] == b[0] and a[1] is b[1] for a, b in zip(now, before, strict=True))


def _same_bits(tensor: Tensor, value: Tensor) -> bool:
    now = tensor.detach()
    if now.is_floating_point() or now.is_complex():
        return bool(torch.equal(now, value)) or bool(((now == value) | ((now != now) & (value != value))).all())
    return bool(torch.equal(now, value))


def _data_attributes(kind: type) -> dict[str, Any]:
    return {
        key: value
        for key, value in vars(kind).items()
        if not key.startswith("__") and not isinstance(value, _CODE) and not hasattr(value, "__get__")
    }


def _class_changed(kind: type, before: dict[str, Any]) -> Callable[[], bool]:
    return lambda: not _same(_data_attributes(kind).items(), before.items())


def _class_restored(kind: type, before: dict[str, Any]) -> Callable[[], None]:
    def restore() -> None:
        for key in _data_attributes(kind).keys() - before.keys():
            delattr(kind, key)
        for key, value in before.items():
            if vars(kind).get(key, _MISSING) is not value:
                setattr(kind, key, value)

    return restore
