"""What a parameter may be, as the documentation says: whatever else is accepted was accepted in silence.

A rule is a function of a value. One that says yes does not insist that the call succeeds: what a value alone cannot
show, its shape beside another argument's say, is left to the call, which may still refuse it in words.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Rule = Callable[[Any], bool]


def anything(value: Any) -> bool:
    """Documented to be taken as it is."""
    return True


def _plain(value: Any) -> Any:
    """NumPy scalars, and arrays and tensors of no dimensions, are what they hold; anything else is itself."""
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray | Tensor) and value.ndim == 0):
        return value.item()
    return value


def integer(least: int | None = None, most: int | None = None) -> Rule:
    """An integer within the bounds; not a truth value."""

    def rule(value: Any) -> bool:
        value = _plain(value)
        if isinstance(value, bool) or not isinstance(value, int):
            return False
        return (least is None or value >= least) and (most is None or value <= most)

    return rule


def number(*, above: float | None = None, least: float | None = None, most: float | None = None) -> Rule:
    """A finite number within the bounds; not a truth value."""

    def rule(value: Any) -> bool:
        value = _plain(value)
        if isinstance(value, bool) or not isinstance(value, Real):
            return False
        try:
            finite = math.isfinite(value)
        except OverflowError:  # an integer beyond any float
            return False
        within = (above is None or value > above) and (least is None or value >= least)
        return finite and within and (most is None or value <= most)

    return rule


def flag(value: Any) -> bool:
    """True or False, of Python, NumPy or torch."""
    return isinstance(_plain(value), bool)


def choice(*values: Any) -> Rule:
    """One of these."""
    return lambda value: any(type(_plain(value)) is type(one) and _plain(value) == one for one in values)


def text(value: Any) -> bool:
    """Any text."""
    return isinstance(value, str)


def path(value: Any) -> bool:
    """What names a file or a folder."""
    return isinstance(value, str | os.PathLike) and str(value) != "" and "\0" not in str(value)


def optional(rule: Rule) -> Rule:
    """None, or as the rule says."""
    return lambda value: value is None or rule(value)


def either(*rules: Rule) -> Rule:
    """As any of the rules says."""
    return lambda value: any(rule(value) for rule in rules)


def instance(*classes: type) -> Rule:
    """An object of one of the classes."""
    return lambda value: isinstance(value, classes) and not isinstance(value, type)


def function(value: Any) -> bool:
    """Anything that can be called, classes and modules of torch included."""
    return callable(value)


def sequence_of(rule: Rule, *, least: int = 0) -> Rule:
    """A list, tuple, range or array of such, or what gives them one by one; a text or a mapping is no sequence."""

    def check(value: Any) -> bool:
        if isinstance(value, str | bytes | bytearray | Mapping | Tensor) or not isinstance(value, Iterable):
            return False
        parts = [] if isinstance(value, np.ndarray) and value.ndim == 0 else list(value)
        return len(parts) >= least and all(rule(part) for part in parts)

    return check


def mapping_of(keys: Rule, values: Rule, *, least: int = 0) -> Rule:
    """A mapping of such keys to such values."""
    return lambda value: (
        isinstance(value, Mapping)
        and len(value) >= least
        and all(keys(key) and values(one) for key, one in value.items())
    )


def _as_array(value: Any) -> np.ndarray | None:
    """A dense array of numbers, from a tensor, an array or nested lists; None where it is none."""
    try:
        if isinstance(value, Tensor):
            value = value.detach().numpy()
        elif not isinstance(value, np.ndarray | list | tuple | range):
            return None
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError, NotImplementedError):
        return None
    return array if array.dtype.kind in "biuf" else None


def array(*ndims: int, kinds: str = "iuf", finite: bool = True, least: int = 1) -> Rule:
    """A dense tensor, array or nested list of numbers with one of these numbers of axes; kinds as NumPy has them."""

    def rule(value: Any) -> bool:
        found = _as_array(value)
        if found is None or found.ndim not in ndims or found.dtype.kind not in kinds or found.size < least:
            return False
        return not finite or bool(np.isfinite(found).all())

    return rule


def labels(value: Any) -> bool:
    """Whole numbers, one per sample."""
    return array(1, kinds="iu")(value)


def rows(value: Any) -> bool:
    """What may stand between the brackets of a kernel: an integer, a slice, integers, or a mask."""
    if isinstance(value, list | tuple) and not value:
        return True
    return integer()(value) or isinstance(value, slice) or array(1, kinds="iub", least=0)(value)


def by_annotation(annotation: str) -> Rule | None:
    """The rule that a parameter's type alone gives, or None."""
    found = ANNOTATIONS.get(annotation)
    if found is None and annotation.endswith(" | None"):
        inner = by_annotation(annotation.removesuffix(" | None"))
        return None if inner is None else optional(inner)
    return found


ANNOTATIONS: dict[str, Rule] = {
    "bool": flag,
    "int": integer(),
    "float": number(),
    "str": text,
    "str | Path": path,
    "Path": path,
    "Tensor": instance(Tensor),
    "torch.Tensor": instance(Tensor),
    "nn.Module": instance(nn.Module),
    "Sequence[str]": sequence_of(text),
    "tuple[str, ...]": sequence_of(text),
    "Transform": function,
    "Callable[[Any], Any]": function,
    "LossFunction": function,
    "str | LossFunction": either(text, function),
    "str | torch.device": either(text, instance(torch.device), integer(0)),
}


def rules_of(function_: Callable[..., Any], given: Mapping[str, Rule]) -> dict[str, Rule]:
    """A rule for every parameter of a callable: the one given, else its annotation's.

    Raises:
        LookupError: a parameter has neither.
    """
    found: dict[str, Rule] = {}
    for name in parameters(function_):
        annotation = str(inspect.signature(function_).parameters[name].annotation)
        rule = given.get(name) or by_annotation(annotation)
        if rule is None:
            raise LookupError(f"{name}: {annotation}")
        found[name] = rule
    return found


def parameters(function_: Callable[..., Any]) -> Iterable[str]:
    """Names of the parameters that a caller can give, in order; *args and **kwargs are not among them."""
    left_out = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [name for name, item in inspect.signature(function_).parameters.items() if item.kind not in left_out]
