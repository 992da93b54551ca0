"""The house: which package stands on which floor. A package imports what stands below it, within functions too.

`python tests/floors.py` prints the list of CONTRIBUTING.md; `python tests/floors.py arrows` what points up.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

from import_graph import Arrow, circles, read_arrows, run_at_import_or_later

# Top first. Packages of one floor know nothing of each other. Each says what is in it, and what it may assume.
FLOORS: tuple[dict[str, str], ...] = (
    {"cli": "the `lossk` command, its configs and grids, and whose code a config may run (`trust.py`): calls, prints"},
    {"report": "the one-file page and pictures: reads kernels and analyses; strings reach the page as text only"},
    {
        "recipes": "ready tasks, by name: data, network, training, config",
        "interop": "other libraries' calls and formats: calls this library, never the reverse; their packages are "
        "imported when they are asked for",
    },
    {"analysis": "what a finished kernel says about the data: reads (`pairs.py`), never samples"},
    {"lossk": "the public names; `build.py` and `cross.py` order the stages. No numerics"},
    {
        "run": "one run, of one rank or of many: what was asked for, what was chosen, what it costs (`cost.py`), what "
        "each rank samples (`work.py`), the kernel of it (`making.py`), what is written down of it (`record.py`)"
    },
    {
        "accumulate": "panels of draws into tiles or a factor, in memory or by way of the log of a run in progress",
        "pilot": 'measures curvature and gradient noise, fills in every "auto", tries it on a short chain',
    },
    {"plan": "what a run will hold, and where its tiles live: plain arithmetic, but for `device_room.py`"},
    {"probe": "the losses of all N rows at the present weights, and how the passes are arranged and proven"},
    {"samplers": "one algorithm, one file; yields after each step and knows nothing of the probe"},
    {"curvature": "what derivatives at the present weights say: curvature, gradient noise, Fisher matrix, metric"},
    {
        "task": "the user's model frozen, its weights views of one flat buffer; one loss per sample or token, whatever "
        "the caller passed; every way of running it gives the losses of the user's own call; puts everything back"
    },
    {
        "data": "any loader, or several, read once, in order, into resident tensors; random streams are put back; "
        "minibatches are counted",
        "kernel": "`LossKernel`, its neighbors, spectrum and errors; traces, which are its factor form; export. Never "
        "samples",
        "ranks": "who is there, what ranks tell one another, how work is dealt: JSON and tensors only; a process alone "
        "is a world of one (`world.py`)",
    },
    {
        "store": "what a `.lossk` store consists of: reads and writes `Contents`, a kernel's parts as data; the log of "
        "commits; `verify`. Zarr v3, JSON, no pickle"
    },
    {"diagnostics": "whether a run can be trusted: numbers, their errors, the verdict in words"},
    {
        "forms": "scaled covariance as tiles or as a factor, centering, watched samples",
        "disk": "files, chunks of arrays, sealed JSON, locks, swaps: whole, durable, checksummed; knows no kernel",
        "ops": "one op, one contract file (below); faster backends are loaded at first use",
    },
    {"ground": "checks of arguments, errors, memory, devices, clocks, versions, optional packages: know no stage"},
)

PUBLIC = ("lossk", "lossk.build", "lossk.cross")  # the floor "lossk"
GROUND = (
    "ambient",
    "available",
    "checks",
    "device",
    "errors",
    "float32",
    "memory",
    "operands",
    "optional",
    "provenance",
    "records",
    "settings",
    "switch",
    "timings",
)  # modules that lie in no package

LEVELS = {package: len(FLOORS) - row for row, floor in enumerate(FLOORS) for package in floor}


def package_of(module: str) -> str:
    """The package that a module belongs to.

    Raises:
        ValueError: it is on no floor.
    """
    if module in PUBLIC:
        return "lossk"
    first = module.split(".")[1]
    if first == "__main__":
        return "cli"
    if first in GROUND and module.count(".") == 1:
        return "ground"
    if first not in LEVELS:
        raise ValueError(f"{module} is on no floor: put it into a package of tests/floors.py")
    return first


def points_down(arrow: Arrow) -> bool:
    """Whether an import stays within its package, or goes to a lower floor."""
    here, there = package_of(arrow.importer), package_of(arrow.imported)
    return here == there or LEVELS[there] < LEVELS[here]


def pointing_up(arrows: Iterable[Arrow]) -> list[Arrow]:
    """The imports that some run of the program follows, and that go to the same or a higher floor."""
    return [arrow for arrow in run_at_import_or_later(arrows) if not points_down(arrow)]


def as_markdown() -> str:
    """The floors as a table, for people."""
    lines = ["| floor | package | what is in it, and what it may assume |", "|---|---|---|"]
    for row, floor in enumerate(FLOORS):
        for package, what in floor.items():
            name = {"lossk": "`__init__.py`", "ground": "flat files"}.get(package, f"`{package}/`")
            lines.append(f"| {len(FLOORS) - row} | {name} | {what} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:] == ["arrows"]:
        found = read_arrows()
        for line in [*map(str, pointing_up(found)), *map(" -> ".join, circles(run_at_import_or_later(found)))]:
            print(line)
    else:
        print(as_markdown())
