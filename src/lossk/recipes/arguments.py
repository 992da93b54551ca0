"""What recipes are given, checked: sources of samples, shares, random seeds."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from lossk.checks import check_integer, check_number, check_tensor, wrong_kind

MOST_EPOCHS = 10**6
MOST_SIDE = 10**5  # of a network's layers, and of tables of answers


def check_source(name: str, value: Any) -> Any:
    """Something that samples can be read from; what is in it is looked at when it is read."""
    plain = isinstance(value, str | bytes | bytearray | set | type | Tensor | np.ndarray)
    if plain or not (hasattr(value, "__iter__") or hasattr(value, "__getitem__")):
        raise wrong_kind(name, "a DataLoader, a Dataset or a tuple (inputs, targets) of tensors", value)
    return value


def check_seed(seed: Any) -> int:
    """An integer from 0 to 2^32 - 1."""
    return check_integer("seed", seed, 0, 2**32 - 1)


def check_share(name: str, value: Any) -> float:
    """A number from 0 to 1."""
    return check_number(name, value, "a number from 0 to 1", least=0.0, most=1.0)


def check_pairs(inputs: Any, targets: Any, *, at_least: int = 1) -> tuple[Tensor, Tensor]:
    inputs = check_tensor("inputs", inputs)
    targets = check_tensor("targets", targets, ("n",), of="an integer", at_least=at_least)
    if inputs.ndim < 2 or len(inputs) != len(targets):
        raise ValueError(f"inputs must be [n, ...] for targets [{len(targets)}], got {list(inputs.shape)}")
    return inputs, targets
