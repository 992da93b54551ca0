"""Makes one call with one bad value, and says what came of it."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import random
import re
import shutil
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import GeneratorType
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn

import lossk
from lossk.errors import LosskError, MissingPackageError

from .rules import Rule
from .values import MAKERS

SECONDS = 10.0  # after which a call ran on; the valid calls take milliseconds
CLEAR, UNNAMED, OBSCURE, SILENT, RAN_ON, VALID = "clear", "unnamed", "obscure", "silent", "ran on", "valid"
CLASSES = (CLEAR, UNNAMED, OBSCURE, SILENT, RAN_ON, VALID)
FAULTS = (UNNAMED, OBSCURE, SILENT, RAN_ON)
WORDS = (TypeError, ValueError, IndexError, OSError, MemoryError, ImportError, LosskError)
SOURCE = str(Path(lossk.__file__).parent)


class RanOn(BaseException):
    """The time is up. Not an Exception, so that no handler of the library takes it."""


class Reached(BaseException):
    """Long work began: the argument was accepted."""


@dataclass(frozen=True)
class Entry:
    """A public callable and one valid call of it.

    Attributes:
        name: as a user writes it.
        function: the callable, bound to an object where it is a method.
        arguments: makes the keywords of a valid call.
        rules: what each parameter may be.
        words: by which an error may name a parameter, beside its own name.
        work: dotted names of functions that stand for long work: a call that reaches one was accepted.
    """

    name: str
    function: Callable[..., Any]
    arguments: Callable[[], dict[str, Any]]
    rules: Mapping[str, Rule]
    words: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    work: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()  # tried instead of `values`, where only texts can be given

    @property
    def group(self) -> str:
        """lossk, lossk.analysis, ..."""
        if "." not in self.name:
            return "config" if self.name.startswith("config") else "command line"
        head = self.name.split(".")
        return ".".join(head[:2]) if len(head) > 2 and head[1] in GROUPS else "lossk"


GROUPS = ("analysis", "interop", "recipes", "ops", "report")


@dataclass(frozen=True)
class Outcome:
    """What one call came to."""

    entry: Entry
    parameter: str
    value: str  # the key in values.MAKERS, or a repr
    kind: str  # one of CLASSES
    detail: str


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raises RanOn in the code below once the time is up."""

    def stop(*_: Any) -> None:
        raise RanOn

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def streams() -> bytes:
    """The state of every global random stream, and of what else a call must leave as it was."""
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002 - the global stream is what is looked at
    world = (random.getstate(), numpy_state["state"]["pos"], numpy_state["state"]["key"].tobytes())
    rest = (torch.get_rng_state().numpy().tobytes(), str(torch.get_default_dtype()), torch.is_grad_enabled())
    return pickle.dumps((world, rest, os.getcwd()))


def files() -> list[str]:
    """Everything in the working folder, which is the fuzz's own."""
    return sorted(os.listdir())


def call(entry: Entry, arguments: dict[str, Any]) -> Any:
    """Call, and use up what is lazy. Reached is raised where long work begins."""
    with contextlib.ExitStack() as stack:
        for target in entry.work:
            stack.enter_context(mock.patch(target, side_effect=Reached))
        for stream in (contextlib.redirect_stdout, contextlib.redirect_stderr):
            stack.enter_context(stream(io.StringIO()))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        found = entry.function(**arguments)
        if isinstance(found, contextlib.AbstractContextManager) and hasattr(found, "gen"):
            found = stack.enter_context(found)
        if isinstance(found, GeneratorType):
            for _ in found:
                pass
        return found


def try_value(entry: Entry, parameter: str, value: str | None = None, given: Any = None) -> Outcome:
    """The valid call with one value put in the place of one argument: a kind of `values`, or a value given."""
    shown = value if value is not None else repr(given)[:80]
    arguments = entry.arguments()
    tried = MAKERS[value]() if value is not None else given
    allowed = bool(entry.rules[parameter](MAKERS[value]() if value is not None else given))
    arguments[parameter] = tried
    before = files(), streams()

    def outcome(kind: str, detail: str = "") -> Outcome:
        for name in set(files()) - set(before[0]):
            shutil.rmtree(name) if Path(name).is_dir() else Path(name).unlink()
        return Outcome(entry, parameter, shown, kind, detail)

    try:
        with within(SECONDS):
            call(entry, arguments)
    except Reached:
        return outcome(VALID if allowed else SILENT, "long work began")
    except RanOn:
        return outcome(RAN_ON)
    except Exception as error:
        left = sorted(set(files()) - set(before[0]))
        if left:
            return outcome(SILENT, f"refused, but left behind {left}: {error}")
        if streams() != before[1]:
            return outcome(SILENT, f"refused, but moved a global state: {error}")
        return outcome(*judge(error, entry, parameter, tried, allowed))
    return outcome(VALID if allowed else SILENT)


def judge(error: Exception, entry: Entry, parameter: str, tried: Any, allowed: bool) -> tuple[str, str]:
    """(class, the error in a line)."""
    detail = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    innermost = traceback.extract_tb(error.__traceback__)[-1]
    ours = innermost.filename.startswith(SOURCE) or type(error).__name__ == "Refused"
    where = f"{detail}  [{Path(innermost.filename).name}:{innermost.lineno}]"
    if allowed and isinstance(tried, nn.Module) and "torch/nn/modules" in innermost.filename:
        return VALID, where  # the caller's own module fails in its own words
    names = (parameter, *entry.words.get(parameter, ()))
    named = any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", str(error)) for name in names)
    if allowed and isinstance(error, MissingPackageError):
        return VALID, where
    if not isinstance(error, WORDS) or isinstance(error, UnicodeError) or not str(error):
        return OBSCURE, where
    if named:
        return CLEAR, where
    return (UNNAMED if ours else OBSCURE), where
