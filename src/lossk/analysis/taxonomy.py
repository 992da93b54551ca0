"""A taxonomy of classes, and similarities in it: Wu and Palmer's, path length, and Lin's with intrinsic content."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lossk.analysis.class_matrix import Array
from lossk.analysis.inputs import check_named
from lossk.checks import check_choice, check_strings, check_text
from lossk.records import check_record

MEASURES = ("wu_palmer", "path", "lin")
ROOT = "(root)"


@dataclass(frozen=True)
class Taxonomy:
    """Classes as nodes of a tree, or of a graph in which a node may have several parents; one root.

    Attributes:
        class_names: [C].
        class_nodes: [C], the node of each class.
        parents: the parents of every ancestor of a class, and of the classes; () of the root.
        content: each of these nodes' intrinsic information content in [0, 1] (Seco, Veale, Hayes 2004):
            1 - ln(1 + descendants) / ln(nodes), in the whole taxonomy; 0 of the root, 1 of a leaf.
    """

    class_names: tuple[str, ...]
    class_nodes: tuple[str, ...]
    parents: Mapping[str, tuple[str, ...]]
    content: Mapping[str, float]

    def __post_init__(self) -> None:
        check_record(self)

    @classmethod
    def from_parents(cls, parents: Mapping[str, str | Sequence[str]], class_nodes: Mapping[str, str]) -> Taxonomy:
        """A taxonomy given as node -> parent, or parents; nodes without an entry are roots (of several, one is made).

        Args:
            class_nodes: class name -> its node, in the order of the labels.

        Raises:
            ValueError: an unknown node, or a cycle.
        """
        given, class_nodes = check_named("parents", parents), _class_nodes(class_nodes)
        graph = {node: (up,) if isinstance(up, str) else _parents_of(node, up) for node, up in given.items()}
        nodes = {*graph, *(up for several in graph.values() for up in several)}
        roots = sorted(node for node in nodes if not graph.get(node))
        unknown = sorted(set(class_nodes.values()) - nodes)
        if unknown:
            raise ValueError(f"class_nodes must be nodes of the taxonomy, got {unknown[0]!r}")
        if not roots:
            raise ValueError("parents must have a root, but every node has a parent: there is a cycle")
        top = {root: () if len(roots) == 1 else (ROOT,) for root in roots}
        whole: dict[str, tuple[str, ...]] = {**graph, **top} if len(roots) == 1 else {**graph, **top, ROOT: ()}
        _refuse_cycles(whole)
        return cls.of_graph(whole, class_nodes)

    @classmethod
    def from_nested(cls, tree: Mapping[str, Any]) -> Taxonomy:
        """A tree given as {"clothing": ["Shirt", "Coat"], "Bag": None}; its leaves are the classes, in that order.

        Raises:
            ValueError: a name occurs twice.
        """
        tree = check_named("tree", tree)
        parents: dict[str, str | Sequence[str]] = {}
        leaves: list[str] = []

        def add(name: str, below: Any, parent: str) -> None:
            check_text("tree: a name", name)
            if name in parents or name == ROOT:
                raise ValueError(f"tree must not hold a name twice, got {name!r}")
            parents[name] = parent
            children = _children_of(name, below)
            if not children:
                leaves.append(name)
            for child, more in children:
                add(child, more, name)

        for name, below in tree.items():
            add(name, below, ROOT)
        return cls.from_parents(parents, {leaf: leaf for leaf in leaves})

    @classmethod
    def of_graph(cls, parents: Mapping[str, tuple[str, ...]], class_nodes: Mapping[str, str]) -> Taxonomy:
        """From the parents of every node of a whole taxonomy without cycles; what no class descends from is left out
        once its descendants are counted."""
        kept = {node for start in class_nodes.values() for node in _ancestors(parents, start)}
        children: dict[str, list[str]] = {}
        for node, several in parents.items():
            for up in several:
                children.setdefault(up, []).append(node)
        size = math.log(len(parents)) if len(parents) > 1 else 1.0
        content = {node: 1.0 - math.log(len(_ancestors(children, node))) / size for node in kept}
        return cls(
            tuple(class_nodes), tuple(class_nodes.values()), {node: tuple(parents[node]) for node in kept}, content
        )

    def similarity(self, measure: str = "wu_palmer") -> Array:
        """[C, C] similarity in [0, 1] between classes, with a diagonal of 1.

        With d(x) the number of nodes on the longest way from the root to x, s the deepest common ancestor (of which the
        shortest way to the root is longest), and n(a, b) the fewest edges between a and b:

        "wu_palmer": 2 d(s) / (n(a, s) + n(b, s) + 2 d(s)) (Wu and Palmer 1994, as NLTK reads it).
        "path": 1 / (1 + n(a, b)).
        "lin": 2 IC(c) / (IC(a) + IC(b)), c the common ancestor of most content (Lin 1998).
        """
        measure = check_choice("measure", measure, MEASURES)
        depths = self._depths()
        above = [_ancestors(self.parents, node) for node in self.class_nodes]
        count = len(self.class_nodes)
        out = np.eye(count)
        for i in range(count):
            for j in range(i):
                common = above[i].keys() & above[j].keys()
                out[i, j] = out[j, i] = self._pair(measure, common, above[i], above[j], i, j, depths)
        return out

    def _pair(
        self,
        measure: str,
        common: Iterable[str],
        above_i: Mapping[str, int],
        above_j: Mapping[str, int],
        i: int,
        j: int,
        depths: Mapping[str, tuple[int, int]],
    ) -> float:
        if measure == "path":
            return 1.0 / (1.0 + min(above_i[node] + above_j[node] for node in common))
        if measure == "lin":
            total = self.content[self.class_nodes[i]] + self.content[self.class_nodes[j]]
            return 2.0 * max(self.content[node] for node in common) / total if total > 0 else 1.0
        deepest = max(depths[node][0] for node in common)
        values = []
        for node in common:
            if depths[node][0] == deepest:
                depth = depths[node][1] + 1
                values.append(2.0 * depth / (above_i[node] + above_j[node] + 2.0 * depth))
        return max(values)

    def _depths(self) -> dict[str, tuple[int, int]]:
        """Edges of the shortest and of the longest way from the root to each node."""
        found: dict[str, tuple[int, int]] = {}

        def depth(node: str) -> tuple[int, int]:
            if node not in found:
                several = [depth(up) for up in self.parents[node]]
                shortest = min((low for low, _ in several), default=-1) + 1
                found[node] = shortest, max((high for _, high in several), default=-1) + 1
            return found[node]

        for node in self.parents:
            depth(node)
        return found


def _class_nodes(given: Any) -> dict[str, str]:
    found = check_named("class_nodes", given)
    return {name: check_text(f"class_nodes[{name!r}]", node) for name, node in found.items()}


def _parents_of(node: str, given: Any) -> tuple[str, ...]:
    name = f"parents[{node!r}]"
    return () if isinstance(given, list | tuple) and not given else check_strings(name, given, "nodes")


def _children_of(name: str, below: Any) -> list[tuple[str, Any]]:
    """What lies below a node of a nested tree: a dict of names, a list of leaves, or None of a leaf."""
    if below is None or (isinstance(below, list | tuple) and not below):
        return []
    if isinstance(below, Mapping):
        return list(below.items())
    return [(child, None) for child in check_strings(f"tree[{name!r}]", below, "names, a dict or None")]


def _ancestors(parents: Mapping[str, Sequence[str]], start: str) -> dict[str, int]:
    """Every node above `start`, itself included, with the fewest edges to it."""
    found, queue = {start: 0}, deque([start])
    while queue:
        node = queue.popleft()
        for up in parents.get(node, ()):
            if up not in found:
                found[up] = found[node] + 1
                queue.append(up)
    return found


def _refuse_cycles(parents: Mapping[str, tuple[str, ...]]) -> None:
    """Kahn's algorithm: of a graph with a cycle some nodes are never free of parents."""
    waiting = {node: len(several) for node, several in parents.items()}
    children: dict[str, list[str]] = {}
    for node, several in parents.items():
        for up in several:
            children.setdefault(up, []).append(node)
    free = deque(node for node, count in waiting.items() if count == 0)
    done = 0
    while free:
        done += 1
        for child in children.get(free.popleft(), ()):
            waiting[child] -= 1
            if waiting[child] == 0:
                free.append(child)
    if done < len(waiting):
        stuck = min(node for node, count in waiting.items() if count > 0)
        raise ValueError(f"parents must have no cycle, but {stuck!r} is in or below one")
