"""Trees of tensors: tuples, lists and mappings, as batches are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

Path = tuple[Any, ...]  # of keys and numbers, from a tree to one of its tensors


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Apply a function to every tensor of a tree of tuples, lists and mappings."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return {key: map_tensors(function, value) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        parts = [map_tensors(function, value) for value in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    raise TypeError(f"loader: batches must be made of tensors, got {type(tree).__name__}")


def leaves(tree: Any) -> list[Tensor]:
    """The tensors of a tree, in order."""
    if isinstance(tree, Tensor):
        return [tree]
    return [leaf for value in (tree.values() if isinstance(tree, Mapping) else tree) for leaf in leaves(value)]


def flat(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Every tensor of a tree with its path, in the order of `leaves`."""
    if isinstance(tree, Tensor):
        yield path, tree
        return
    for key, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
        yield from flat(value, (*path, key))
