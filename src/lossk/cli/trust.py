"""Which code a config may name: the one place where a string of a file becomes an import and a call.

The rule is where the config comes from, not how the function is called. Who types `lossk run mine.yaml` runs mine.yaml,
and it may name code of theirs. A config that is only found, beside a store say, runs nothing but packaged recipes.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import typing
from collections.abc import Callable, Mapping
from typing import Any

from lossk.recipes import RecipeTask, packaged_tasks

WRITTEN = ("checkpoint", "checkpoints", "cache")  # arguments of recipes that name what the recipe writes


def task_function(task: str, arguments: Mapping[str, Any], *, trusted: bool) -> Callable[..., Any]:
    """The function "module:function" of a config. Modules in the current folder can be named by a trusted config.

    Args:
        arguments: what the config calls it with.
        trusted: the user named this config as one to run; else only packaged recipes are run, and write no file.

    Raises:
        ValueError: the user has not vouched for this code, there is no such function, or it makes no task.
    """
    if not trusted:
        _refuse_strangers(task, arguments)
    module_name, function_name = task.split(":")
    if trusted and "" not in sys.path:  # an installed command, unlike `python -m`, does not look there
        sys.path.insert(0, "")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ValueError(f"task {task!r} cannot be found: {error}") from error
    other = _what_else_it_is(function)
    if other is not None:
        raise ValueError(
            f"task {task!r} must return a lossk.recipes.RecipeTask, got {other}; what is called says so: "
            f"def {function_name}(...) -> RecipeTask"
        )
    return function


def _refuse_strangers(task: str, arguments: Mapping[str, Any]) -> None:
    if task not in packaged_tasks():
        raise ValueError(
            f"task {task!r} is named by a config that lies beside a store, and is no packaged recipe; pass --trust to "
            "import and call it, or the labels as a file"
        )
    written = [name for name in WRITTEN if arguments.get(name) is not None]
    if written:
        raise ValueError(
            f"task {task!r} would write task_args.{written[0]} = {arguments[written[0]]!r}, which a config that lies "
            "beside a store names; pass --trust to let it"
        )


def _what_else_it_is(function: Any) -> str | None:
    """None for a function that makes tasks, known before the call; else what it is, or returns.

    Its annotation says so or, without one, its module or its body names RecipeTask, as what makes one must get it from
    somewhere. os.system and its kind know nothing of it.
    """
    function = inspect.unwrap(function) if callable(function) else function
    if not inspect.isfunction(function):
        return f"{type(function).__name__} {getattr(function, '__qualname__', '')}".strip()
    try:
        stated = typing.get_type_hints(function).get("return")
    except (NameError, TypeError, AttributeError, SyntaxError):  # of names that are there for a type checker only
        stated = None
    if isinstance(stated, type):
        return None if issubclass(stated, RecipeTask) else stated.__name__
    modules = ("lossk", "lossk.recipes")
    knows = "RecipeTask" in function.__code__.co_names or any(
        value is RecipeTask or (inspect.ismodule(value) and value.__name__ in modules)
        for value in list(function.__globals__.values())
    )
    return None if knows else f"a function of {function.__module__}, which does not know RecipeTask"
