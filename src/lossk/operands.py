"""Checks that the ops have in common. An op writes in place, so nothing is converted: a tensor is asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lossk.checks import check_integer, check_number, shown, wrong_kind

MOST_INT64 = 2**63 - 1


def check_operands(**operands: Any) -> None:
    """Raise TypeError unless each is a dense tensor."""
    for name, value in operands.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if value.layout is not torch.strided or value.is_quantized or value.is_meta:
            kind = value.dtype if value.is_quantized else value.layout if not value.is_meta else "on the meta device"
            raise TypeError(f"{name} must be a dense tensor, got one that is {kind}")


def check_word(name: str, value: Any, words: tuple[str, ...]) -> None:
    """Raise unless it is one of some words."""
    rule = f"one of {', '.join(words)}"
    if not isinstance(value, str):
        raise wrong_kind(name, rule, value)
    if value not in words:
        raise ValueError(f"{name} must be {rule}, got {shown(value)}")


def check_ignored(ignore_index: Any) -> int:
    """The target that does not count: any integer that a target can be."""
    return check_integer("ignore_index", ignore_index, -MOST_INT64 - 1, ceiling=MOST_INT64)


def check_scale(scale: Any) -> float:
    """A finite factor."""
    return check_number("scale", scale)
