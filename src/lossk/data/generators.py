"""The random generators that a caller's loader, sampler or dataset holds, put back where they were after reading."""

from __future__ import annotations

import functools
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from types import CodeType, FunctionType, MemberDescriptorType, MethodType, ModuleType, NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor

KINDS = (torch.Generator, np.random.Generator, np.random.RandomState, np.random.BitGenerator, random.Random)
PLAIN = (str, bytes, int, float, complex, NoneType, Tensor, np.ndarray, np.generic, ModuleType)
MOST_OBJECTS = 20_000  # looked at in all: some tens of milliseconds
MOST_OF_ONE = 1_000  # elements looked at of one container: a dataset's list of a million paths holds no generator
LIBRARIES = {*sys.stdlib_module_names, "torch", "numpy"}  # whose classes and functions hold no stream of a caller's


@contextmanager
def generators_kept(*sources: Any) -> Iterator[None]:
    """Put every generator that is found in the sources back, whatever happens."""
    puts = [put_back(generator) for generator in find_generators(*sources)]
    try:
        yield
    finally:
        for put in puts:
            put()


def find_generators(*sources: Any) -> list[Any]:
    """The generators of torch, NumPy and `random` that can be reached from the sources.

    Looked through are attributes, class attributes, containers, partial functions, closures, and the globals that a
    method or function names, breadth first. A generator within an iterator or a compiled extension stays hidden.
    """
    waiting, found = deque(sources), []
    seen: dict[int, Any] = {}
    while waiting and len(seen) < MOST_OBJECTS:
        item = waiting.popleft()
        kind = type(item)  # here and below not isinstance: a lazy proxy would answer for what it stands for
        if issubclass(kind, PLAIN) or id(item) in seen:
            continue
        seen[id(item)] = item
        if issubclass(kind, KINDS):
            found.append(item)
        else:
            waiting.extend(islice(_held_by(item), MOST_OF_ONE))
    return [generator for generator in found if not isinstance(generator, random.SystemRandom)]


def put_back(generator: Any) -> Callable[[], object]:
    """A function that sets the generator to its present state."""
    if isinstance(generator, torch.Generator):
        return functools.partial(generator.set_state, generator.get_state())
    if isinstance(generator, np.random.RandomState):
        return functools.partial(generator.set_state, generator.get_state(legacy=False))
    if isinstance(generator, random.Random):
        return functools.partial(generator.setstate, generator.getstate())
    bits = generator.bit_generator if isinstance(generator, np.random.Generator) else generator
    return functools.partial(setattr, bits, "state", bits.state)


def _held_by(item: Any) -> Iterator[Any]:
    kind = type(item)
    if kind is FunctionType:
        yield from _of_function(item)
    elif kind is MethodType:
        yield from (item.__self__, item.__func__)
    elif kind in (staticmethod, classmethod):
        yield item.__func__
    elif kind is property:
        yield item.fget
    elif kind is functools.partial:
        yield from (item.func, *item.args, *item.keywords.values())
    elif issubclass(kind, type):
        yield from (value for kind in item.__mro__ if not _of_library(kind) for value in vars(kind).values())
    else:
        yield from _of_object(item)


def _of_object(item: Any) -> Iterator[Any]:
    kind = type(item)
    yield kind
    with suppress(AttributeError):  # not getattr, which may run a caller's code
        yield from object.__getattribute__(item, "__dict__").values()
    for base in kind.__mro__:
        for member in vars(base).values():
            if isinstance(member, MemberDescriptorType):
                with suppress(AttributeError):  # an empty slot
                    yield member.__get__(item)
    if issubclass(kind, dict):
        yield from dict.values(item)
    elif issubclass(kind, list | tuple | deque):
        yield from item


def _of_function(function: FunctionType) -> Iterator[Any]:
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # an empty cell
            yield cell.cell_contents
    if _of_library(function):
        return
    for name in _names_in(function.__code__):
        value = function.__globals__.get(name)
        code = isinstance(value, FunctionType | type)
        if not code or value.__module__ == function.__module__:  # another module's code is not followed
            yield value


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)


def _of_library(item: Any) -> bool:
    return str(getattr(item, "__module__", "")).partition(".")[0] in LIBRARIES
