"""Who imports whom among the modules of `src/lossk`, read from the source with `ast`: nothing is run.

`python tests/import_graph.py` prints circles of modules, and arrows that point up in the house of `floors.py`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src"


@dataclass(frozen=True)
class Arrow:
    """One import: `importer` names `imported`, both modules of the package that is read."""

    importer: str
    imported: str
    line: int
    place: str  # "module", "function", or "typing": under `if TYPE_CHECKING`, which is not run

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}" + (" (typing)" if self.place == "typing" else "")


def modules_of(source: Path, package: str = "lossk") -> dict[str, Path]:
    """Module name -> file; a package's `__init__` goes by the package's name."""
    found = {}
    for path in sorted((source / package).rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def read_arrows(source: Path = SOURCE, package: str = "lossk") -> list[Arrow]:
    """Every import of a module by another of the same package."""
    modules = modules_of(source, package)
    found = []
    for name, path in modules.items():
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        for node, place in _imports(tree, "module"):
            targets = {target for target in _targets(node, name, path, modules) if target in modules}
            found += [Arrow(name, target, node.lineno, place) for target in sorted(targets - {name})]
    return found


def _imports(node: ast.AST, place: str) -> Iterator[tuple[ast.Import | ast.ImportFrom, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, place
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for part in child.body:
                yield from _imports(ast.Module([part], []), "typing")
            for part in child.orelse:
                yield from _imports(ast.Module([part], []), place)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and place != "typing":
            yield from _imports(child, "function")
        else:
            yield from _imports(child, place)


def _targets(node: ast.Import | ast.ImportFrom, name: str, path: Path, modules: Mapping[str, Path]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    base = node.module or ""
    if node.level:
        above = name.split(".")
        above = above[: len(above) - node.level + (path.stem == "__init__")]
        base = ".".join([*above, base] if base else above)
    for alias in node.names:
        full = f"{base}.{alias.name}"
        yield full if full in modules else base


def run_at_import_or_later(arrows: Iterable[Arrow]) -> list[Arrow]:
    """The arrows that some run of the program follows: all but those for type checkers only."""
    return [arrow for arrow in arrows if arrow.place != "typing"]


def circles(arrows: Iterable[Arrow]) -> list[list[str]]:
    """Modules that reach each other (strongly connected components of more than one), each sorted; by Tarjan (1972)."""
    followers: dict[str, list[str]] = {}
    for arrow in arrows:
        followers.setdefault(arrow.importer, []).append(arrow.imported)
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        order[name] = low[name] = len(order)
        stack.append(name)
        for other in followers.get(name, ()):
            if other not in order:
                visit(other)
            if other in stack:
                low[name] = min(low[name], low[other])
        if low[name] == order[name]:
            at = stack.index(name)
            members = sorted(stack[at:])
            del stack[at:]
            if len(members) > 1:
                found.append(members)

    for name in sorted(followers):
        if name not in order:
            visit(name)
    return sorted(found)
