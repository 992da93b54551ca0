"""Trees of tensors: tuples, lists, mappings and dataclasses, as batches are made of."""

from __future__ import annotations

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

Path = tuple[Any, ...]  # of keys, names and numbers, from a tree to one of its tensors


class Collated:
    """A batch of any form, which is no tree, and how many samples it holds."""

    def __init__(self, batch: Any, size: int) -> None:
        self.batch, self.size = batch, size


def children(tree: Any) -> dict[Any, Any] | None:
    """The parts of a tuple, list, mapping or dataclass by their keys; None of anything else."""
    if isinstance(tree, Mapping):
        return dict(tree.items())
    if isinstance(tree, tuple | list):
        return dict(enumerate(tree))
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree)}
    return None


def rebuilt(tree: Any, parts: dict[Any, Any]) -> Any:
    """A tree like this one with other parts: a list as a tuple, a mapping as a dict, unless it is a UserDict."""
    if isinstance(tree, tuple | list):
        return type(tree)(*parts.values()) if hasattr(tree, "_fields") else tuple(parts.values())
    if isinstance(tree, UserDict):
        made = copy.copy(tree)
        made.data = parts
        return made
    if isinstance(tree, Mapping):
        return parts
    made = copy.copy(tree)
    for name, value in parts.items():
        object.__setattr__(made, name, value)  # as it may be frozen
    return made


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Apply a function to every tensor of a tree."""
    if isinstance(tree, Tensor):
        return function(tree)
    parts = children(tree)
    if parts is None:
        raise TypeError(f"loader: batches must be made of tensors, got {type(tree).__name__}")
    return rebuilt(tree, {key: map_tensors(function, value) for key, value in parts.items()})


def flat(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Every tensor of a tree with its path, in the order of `leaves`."""
    if isinstance(tree, Tensor):
        yield path, tree
        return
    for key, value in (children(tree) or {}).items():
        yield from flat(value, (*path, key))


def leaves(tree: Any) -> list[Tensor]:
    """The tensors of a tree, in order."""
    return [tensor for _, tensor in flat(tree)]
