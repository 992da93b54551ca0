"""Checkers of arguments: each takes a name and a value, and returns the value in its plain form, or raises.

A wrong kind is a TypeError, a wrong value a ValueError; the text names the argument, the rule and the value. What users
really have is accepted: NumPy scalars, arrays and tensors of no dimensions, and whatever has `__index__`. What comes
back is plain Python (or one tensor), so that results can be written as JSON and compare equal.
"""

from __future__ import annotations

import itertools
import math
import numbers
import operator
import os
import reprlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

MOST_INTEGER = 2**31 - 1  # a count that no run reaches, and that no int32 index overflows
MOST_NUMBER = float(np.finfo(np.float32).max)  # numbers meet float32 weights: beyond it they are infinite there
LEAST_POSITIVE = float(np.finfo(np.float32).tiny)  # and below it they are zero, or lose digits
MOST_STRINGS = 10**6  # an iterable that goes on past it is taken for endless
MOST_DEPTH = 64  # of nested lists and dicts; what refers to itself is deeper
SCALAR_KINDS = "biufcU"  # of NumPy scalars with a Python counterpart; a time is no number
TENSOR_KINDS = {
    "a real number": "biuf",
    "a number": "iuf",
    "an integer": "iu",
    "a flag": "b",
    "an integer or a flag": "biu",
}

PLAIN = frozenset({bool, int, float, str, type(None)})

Checked = TypeVar("Checked")


# -- how values are shown ---------------------------------------------------------------------------------------------

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120
_SHORT.maxlevel = 3


def shown(value: Any) -> str:
    """A value as an error message shows it: its repr, shortened; of an array or a tensor its dtype and shape."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, Tensor | np.ndarray) and value.ndim:
        return f"{type(value).__name__} of {str(value.dtype).removeprefix('torch.')} and shape {list(value.shape)}"
    try:
        return " ".join(_SHORT.repr(value).split())
    except Exception:  # a repr that fails (an integer of 5,000 digits, a user's own) must not hide the rule
        return f"a value of type {type(value).__name__}"


def wrong_kind(name: str, rule: str, value: Any) -> TypeError:
    """The error of a value of a wrong kind, which it names."""
    kind = f" ({type(value).__name__})" if type(value).__module__ == "builtins" and not isinstance(value, type) else ""
    return TypeError(f"{name} must be {rule}, got {shown(value)}{kind}")


def wrong_value(name: str, rule: str, value: Any) -> ValueError:
    """The error of a value of the right kind that breaks the rule."""
    return ValueError(f"{name} must be {rule}, got {shown(value)}")


# -- scalars ----------------------------------------------------------------------------------------------------------


def check_integer(
    name: str,
    value: Any,
    least: int,
    most: int | None = None,
    *,
    limit: str | None = None,
    ceiling: int = MOST_INTEGER,
) -> int:
    """An integer from `least` to `most`; flags and floats are none.

    Args:
        limit: how the error says `most`, where the number alone does not explain it.
        ceiling: without `most`, what is refused as beyond all use.
    """
    plain = plain_scalar(value)
    if isinstance(plain, bool | Tensor | np.ndarray) or not hasattr(type(plain), "__index__"):
        raise wrong_kind(name, "an integer", value)
    number = int(operator.index(plain))
    if not least <= number <= (ceiling if most is None else most):
        rule = f"at least {least}" if number < least else f"at most {ceiling}"
        if most is not None:
            rule = f"from {least} to {most}" if limit is None else f"an integer from {least} to {limit}"
        raise wrong_value(name, rule, number)
    return number


def check_number(
    name: str,
    value: Any,
    kind: str = "a number",
    *,
    above: float | None = None,
    least: float | None = None,
    most: float = MOST_NUMBER,
) -> float:
    """A finite number greater than `above`, or at least `least`, and at most `most`.

    Args:
        kind: what the argument may be, for the error.
    """
    plain = plain_scalar(value)
    extended = isinstance(plain, np.longdouble)  # which NumPy has no Python scalar for
    if (
        isinstance(plain, bool)
        or not isinstance(plain, numbers.Real)
        or (isinstance(plain, np.generic) and not extended)
    ):
        raise wrong_kind(name, kind, value)
    try:
        number = float(plain) + 0.0  # -0 becomes 0
    except OverflowError:
        number = math.inf
    low = -most if least is None and above is None else least
    too_low = number <= above if above is not None else number < (low if low is not None else -most)
    if not math.isfinite(number) or too_low:
        rule = f"greater than {above:g}" if above is not None else f"at least {low:g}"
        raise wrong_value(name, f"finite and {rule}", value)
    if number > most or (above == 0.0 and number < LEAST_POSITIVE):
        rule = f"at most {most:g}" if number > most else f"at least {LEAST_POSITIVE:g}, the least of float32,"
        raise wrong_value(name, rule, value)
    return number


def check_flag(name: str, value: Any) -> bool:
    """True or False; numbers and words are neither."""
    plain = plain_scalar(value)
    if not isinstance(plain, bool):
        raise wrong_kind(name, "True or False", value)
    return plain


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> Any:
    """One of `choices`, which are words, flags, integers or None; equal and of the same type."""
    choices, plain = list(choices), plain_scalar(value)
    if isinstance(plain, str):
        plain = str(plain)  # of a subclass, too
    kinds = {type(choice) for choice in choices}
    if type(plain) not in kinds:
        raise wrong_kind(name, f"one of {choices}", value)
    for choice in choices:
        if choice == plain:
            return choice
    raise wrong_value(name, f"one of {choices}", value)


def check_automatic(name: str, value: Any, *, above: float | None = None, least: float | None = None) -> float | Any:
    """ "auto", or a finite number greater than `above`, or at least `least`."""
    if isinstance(value, str):
        return check_choice(name, value, ("auto",))
    return check_number(name, value, "a number or 'auto'", above=above, least=least)


def check_optional(check: Callable[..., Checked], name: str, value: Any, *rules: Any, **more: Any) -> Checked | None:
    """None, or what `check(name, value, *rules, **more)` returns."""
    return None if value is None else check(name, value, *rules, **more)


def plain_scalar(value: Any) -> Any:
    """The Python scalar of a NumPy scalar, or of an array or a tensor of no dimensions; anything else as it is."""
    if type(value) in PLAIN:  # of an op's arguments, at every step of a chain
        return value
    if isinstance(value, np.generic | np.ndarray):
        return value.item() if value.ndim == 0 and value.dtype.kind in SCALAR_KINDS else value
    if isinstance(value, Tensor) and value.ndim == 0:
        try:
            return value.item()
        except (RuntimeError, NotImplementedError):  # a meta tensor has no value
            return value
    return value


# -- texts, callables, objects ----------------------------------------------------------------------------------------


def check_text(name: str, value: Any) -> str:
    """Text that is not empty."""
    if not isinstance(value, str):
        raise wrong_kind(name, "text", value)
    if not value:
        raise wrong_value(name, "text that is not empty", value)
    return str(value)


def check_strings(name: str, value: Any, what: str = "texts") -> tuple[str, ...]:
    """A list of texts, at least one and none empty: any iterable but a text, bytes and a dict; a set is sorted.

    Args:
        what: the texts are, for the error.
    """
    rule = f"a list of {what}"
    none = isinstance(value, str | bytes | bytearray | Mapping | Tensor) or getattr(value, "ndim", 1) == 0
    if none or not isinstance(value, Iterable):
        raise wrong_kind(name, rule, value)
    texts = list(itertools.islice(value, MOST_STRINGS + 1))
    for text in texts:
        if not isinstance(text, str):
            raise wrong_kind(name, f"{rule}, each a text", text)
    if not texts or "" in texts or len(texts) > MOST_STRINGS:
        raise wrong_value(name, f"{rule}, from 1 to {MOST_STRINGS} and none empty", texts)
    texts = [str(text) for text in texts]
    return tuple(sorted(texts) if isinstance(value, set | frozenset) else texts)


def check_callable(name: str, value: Any, rule: str = "a callable") -> Any:
    """Something to call that is not a class."""
    if isinstance(value, type) or not callable(value):
        raise wrong_kind(name, rule, value)
    return value


def check_instance(name: str, value: Any, *kinds: type, optional: bool = False) -> Any:
    """An instance of one of some classes; with `optional` also None."""
    if isinstance(value, kinds) or (optional and value is None):
        return value
    rule = " or ".join(f"a {kind.__module__.split('.')[0]}.{kind.__name__}" for kind in kinds)
    found = shown(value) if isinstance(value, type) else type(value).__name__
    raise TypeError(f"{name} must be {rule}{' or None' if optional else ''}, got {found}")


def check_device(name: str, value: Any) -> str | torch.device | None:
    """The name of a device, a torch.device, or None; whether it is here is asked later."""
    if value is not None and not isinstance(value, str | torch.device):
        raise wrong_kind(name, "a device's name, a torch.device or None", value)
    if str(value) == "meta" or value == "":
        raise wrong_value(name, "a device that holds numbers", value)
    return value


def check_path(name: str, value: Any) -> Path:
    """A path: text or a path object, of a file or a folder that has a name."""
    if not isinstance(value, str | os.PathLike) or not isinstance(text := os.fspath(value), str):
        raise wrong_kind(name, "a path, as text or pathlib.Path", value)
    try:
        encoded = os.fsencode(text)
    except UnicodeEncodeError:
        raise wrong_value(name, "a path that the file system can encode", value) from None
    if not Path(text).name or b"\0" in encoded or max(len(part) for part in encoded.split(b"/")) > 255:
        raise wrong_value(name, "a path with a name, without null characters, at most 255 bytes a part", value)
    return Path(text)


def check_place(name: str, value: Any) -> Path:
    """As `check_path`, or a folder that has no name: the current one, or the root."""
    nameless = isinstance(value, str | os.PathLike) and str(value) in (".", "/")
    return Path(value) if nameless else check_path(name, value)


# -- nested data ------------------------------------------------------------------------------------------------------


def check_mapping(name: str, value: Any) -> dict[str, Any]:
    """A dict with text keys."""
    if not isinstance(value, Mapping):
        raise wrong_kind(name, "a dict", value)
    for key in value:
        if not isinstance(key, str):
            raise wrong_kind(name, "a dict whose keys are texts", key)
    return dict(value)


def check_json(name: str, value: Any) -> dict[str, Any]:
    """A dict that JSON can hold, in plain Python: NumPy scalars become Python's, tuples lists."""
    return _json(name, check_mapping(name, value), 0)


def _json(name: str, value: Any, depth: int) -> Any:
    if depth > MOST_DEPTH:
        raise ValueError(f"{name} must be nested at most {MOST_DEPTH} deep")
    value = plain_scalar(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {key: _json(f"{name}[{key!r}]", each, depth + 1) for key, each in check_mapping(name, value).items()}
    if isinstance(value, list | tuple):
        return [_json(f"{name}[{i}]", each, depth + 1) for i, each in enumerate(value)]
    raise wrong_kind(name, "what JSON holds: text, numbers, flags, None, lists or dicts", value)


# -- tensors ----------------------------------------------------------------------------------------------------------


def check_tensor(
    name: str,
    value: Any,
    shape: tuple[int | str, ...] | None = None,
    *,
    of: str = "a number",
    finite: bool = True,
    at_least: int = 1,
) -> Tensor:
    """A dense tensor of numbers, of a given shape: from a tensor, an array, nested lists, or what has `__array__`.

    The dtype stays (a list's is float64, int64 or bool), and so does a tensor's device. It shares memory where it can.

    Args:
        shape: sizes; a text stands for any size of at least `at_least`, and says what it counts.
        of: the kind of an entry: one of TENSOR_KINDS; "a real number" may be a flag.
        finite: refuse NaN and infinities, and name the first.
    """
    tensor = _as_tensor(name, value)
    if _kind_of(tensor.dtype) not in TENSOR_KINDS[of]:
        raise wrong_kind(name, f"a tensor or array, each entry {of}", value)
    if shape is not None:
        sizes = list(tensor.shape)
        fits = len(sizes) == len(shape) and all(
            size >= at_least if isinstance(wanted, str) else size == wanted
            for size, wanted in zip(sizes, shape, strict=True)
        )
        if not fits:
            wanted = ", ".join(str(size) for size in shape)
            raise ValueError(f"{name} must have shape [{wanted}], got {sizes}")
    if finite and tensor.is_floating_point():
        refuse_non_finite(name, tensor)
    return tensor


def refuse_non_finite(name: str, tensor: Tensor) -> None:
    """Raise ValueError, with the place and the value of the first, where an entry is NaN or infinite."""
    bad = ~torch.isfinite(tensor)
    if bad.any():
        at = bad.nonzero()[0].tolist()
        raise ValueError(f"{name} must be finite, got {float(tensor[tuple(at)])} at {at}")


def _as_tensor(name: str, value: Any) -> Tensor:
    rule = "a tensor, an array or nested lists of equal length, of numbers"
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.is_quantized or value.is_nested or value.device.type == "meta":
            raise TypeError(f"{name} must be a dense tensor that holds numbers, got {_layout(value)}")
        return value.detach()
    taken = isinstance(value, list | tuple | range | np.generic | int | float) or hasattr(value, "__array__")
    if not taken or isinstance(value, type):
        raise wrong_kind(name, rule, value)
    try:
        array = np.asarray(value)
    except Exception as error:  # ragged lists, a tensor that requires grad in a list, a user's __array__
        raise TypeError(f"{name} must be {rule}, got {shown(value)}: {error}") from error
    if array.dtype.kind not in "biuf":
        raise wrong_kind(name, rule, value)
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:  # torch has no extended precision
        array = array.astype(np.float64)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype.kind in "iu":  # C has several names for one width, of which torch knows one
        array = array.view(f"{array.dtype.kind}{array.dtype.itemsize}")
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()
    return torch.from_numpy(array)


def _kind_of(dtype: torch.dtype) -> str:
    if dtype is torch.bool:
        return "b"
    if dtype.is_complex:
        return "c"
    return "f" if dtype.is_floating_point else "i"


def _layout(tensor: Tensor) -> str:
    if tensor.device.type == "meta":
        return "one on the meta device"
    if tensor.is_quantized:
        return f"a quantized one, {tensor.dtype}"
    return f"one of layout {tensor.layout}"
