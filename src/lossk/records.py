"""The fields of a dataclass, checked by the types they are annotated with: for records of settings and results."""

from __future__ import annotations

import dataclasses
import numbers
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from lossk.checks import check_flag, check_integer, check_mapping, wrong_kind, wrong_value


def check_record(record: Any) -> None:
    """Raise TypeError or ValueError, naming the field, unless every field is of its annotation's kind.

    To be called from `__post_init__`, in a module with `from __future__ import annotations`. A field that is annotated
    with a class of its module must be an instance; `X | None` may be None; what is annotated with anything else,
    `Any` say, is left to the class itself.
    """
    names = vars(sys.modules[type(record).__module__])
    for field in dataclasses.fields(record):
        annotation, value = str(field.type), getattr(record, field.name)
        if annotation.endswith(" | None"):
            if value is None:
                continue
            annotation = annotation.removesuffix(" | None")
        several = annotation.startswith("tuple[") and annotation not in CHECKS
        kind = names.get(annotation.removeprefix("tuple[").removesuffix(", ...]") if several else annotation)
        if annotation in CHECKS:
            CHECKS[annotation](field.name, value)
        elif several and isinstance(kind, type):
            if not isinstance(value, tuple) or not all(isinstance(one, kind) for one in value):
                raise wrong_kind(field.name, f"a tuple, each a {kind.__name__}", value)
        elif isinstance(kind, type) and kind is not Any and not isinstance(value, kind):
            raise wrong_kind(field.name, f"a {kind.__name__}", value)


def _of(rule: str, *kinds: type) -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        if not isinstance(value, kinds):
            raise wrong_kind(name, rule, value)

    return check


def _real(name: str, value: Any) -> None:
    """NaN and infinities too: a result may be either."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise wrong_kind(name, "a number", value)
    try:
        float(value)
    except OverflowError:
        raise wrong_value(name, "a number that float64 holds", value) from None


def _count(name: str, value: Any) -> None:
    check_integer(name, value, 0)


def _texts(name: str, value: Any) -> None:
    """No list at all is a list without names."""
    if isinstance(value, str | bytes | bytearray) or not isinstance(value, Sequence):
        raise wrong_kind(name, "a list of texts", value)
    for text in value:
        if not isinstance(text, str):
            raise wrong_kind(name, "a list of texts", text)


def _array(name: str, value: Any) -> None:
    if not isinstance(value, np.ndarray) or value.ndim == 0 or value.dtype.kind not in "biuf":
        raise wrong_kind(name, "a NumPy array of numbers", value)


def _numbers(name: str, value: Any) -> None:
    for key, number in check_mapping(name, value).items():
        _real(f"{name}[{key!r}]", number)


CHECKS: Mapping[str, Callable[[str, Any], Any]] = {
    "int": _count,
    "float": _real,
    "bool": check_flag,
    "str": _of("text", str),
    "Tensor": _of("a tensor", Tensor),
    "Array": _array,
    "nn.Module": _of("a torch.nn.Module", nn.Module),
    "tuple[str, ...]": _texts,
    "Sequence[str]": _texts,
    "Mapping[str, float]": _numbers,
    "Mapping[str, tuple[str, ...]]": check_mapping,
    "Mapping[str, slice]": check_mapping,
}
