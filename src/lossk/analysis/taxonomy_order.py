"""Classes in the order of a taxonomy read from left to right: a place for each class, and names for stretches of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lossk.analysis.taxonomy import Taxonomy
from lossk.checks import check_instance, check_integer, check_number
from lossk.records import check_record


@dataclass(frozen=True)
class Stretch:
    """Neighboring places that one node of the taxonomy covers."""

    node: str
    first: int
    count: int

    def __post_init__(self) -> None:
        check_record(self)


def places(taxonomy: Taxonomy) -> NDArray[np.int64]:
    """The place of each class, from 0 to C - 1, in a walk of the taxonomy that finishes one branch before the next.

    A node of several parents hangs under its first one (WordNet names the principal hypernym first), so that what
    results is a tree, and the classes below any node of it are neighbors: [C].
    """
    check_instance("taxonomy", taxonomy, Taxonomy)
    place = {node: number for number, node in enumerate(_walk(taxonomy))}
    return np.array([place[node] for node in taxonomy.class_nodes])


def stretches(taxonomy: Taxonomy, most: int = 16, least_share: float = 0.02) -> list[Stretch]:
    """The taxonomy cut into at most `most` nodes that name many classes each, from left to right.

    The node with most classes is split into its children, and so on; children of less than `least_share` of all classes
    are left out, and a node that would lose more than a third of its own that way stays whole.
    """
    check_instance("taxonomy", taxonomy, Taxonomy)
    most = check_integer("most", most, 1)
    least_share = check_number("least_share", least_share, "a share", least=0.0, most=1.0)
    children, own = _tree(taxonomy), set(taxonomy.class_nodes)
    below = _counts(children, own)
    fewest = max(least_share * len(own), 1.0)
    first = _firsts(children, below, own)
    shown = [_root(taxonomy)]
    while True:
        shown.sort(key=lambda node: -below[node])
        for node in shown:
            parts = [child for child in children[node] if below[child] >= fewest]
            kept = sum(below[child] for child in parts)
            if 3 * kept >= 2 * below[node] > 0 and len(shown) - 1 + len(parts) <= most:
                shown.remove(node)
                shown += parts
                break
        else:
            return sorted((Stretch(node, first[node], below[node]) for node in shown), key=lambda s: s.first)


def _root(taxonomy: Taxonomy) -> str:
    return next(node for node, several in taxonomy.parents.items() if not several)


def _tree(taxonomy: Taxonomy) -> dict[str, list[str]]:
    """Children of each node, in the order of their names."""
    children: dict[str, list[str]] = {node: [] for node in taxonomy.parents}
    for node, several in sorted(taxonomy.parents.items()):
        if several:
            children[several[0]].append(node)
    return children


def _walk(taxonomy: Taxonomy) -> list[str]:
    """The classes' nodes in depth-first order; a class that has classes below it comes before them."""
    children, own = _tree(taxonomy), set(taxonomy.class_nodes)
    found, stack = [], [_root(taxonomy)]
    while stack:
        node = stack.pop()
        if node in own:
            found.append(node)
        stack += reversed(children[node])
    return found


def _counts(children: dict[str, list[str]], own: set[str]) -> dict[str, int]:
    """Classes at or below each node."""
    found: dict[str, int] = {}

    def count(node: str) -> int:
        found[node] = int(node in own) + sum(count(child) for child in children[node])
        return found[node]

    for node in children:
        if node not in found:
            count(node)
    return found


def _firsts(children: dict[str, list[str]], below: dict[str, int], own: set[str]) -> dict[str, int]:
    """The place at which each node's classes begin."""
    roots = set(children) - {child for several in children.values() for child in several}
    found = dict.fromkeys(roots, 0)
    stack = list(roots)
    while stack:
        node = stack.pop()
        at = found[node] + int(node in own)
        for child in children[node]:
            found[child] = at
            at += below[child]
            stack.append(child)
    return found
