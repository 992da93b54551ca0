"""Every import goes to a lower floor of the house, within functions too; a planted one that does not is found."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from floors import FLOORS, GROUND, LEVELS, as_markdown, package_of, pointing_up
from import_graph import SOURCE, circles, modules_of, read_arrows, run_at_import_or_later

ROOT = SOURCE.parent


def test_every_module_is_on_a_floor() -> None:
    names = modules_of(SOURCE)
    found = {package_of(name) for name in names}
    assert found == set(LEVELS)
    assert {f"lossk.{name}" for name in GROUND} <= set(names)


def test_a_package_is_on_one_floor() -> None:
    assert sum(map(len, FLOORS)) == len(LEVELS)


def test_imports_point_down() -> None:
    up = pointing_up(read_arrows())
    assert not up, "\n".join(map(str, up))


def test_kernels_import_only_kernels() -> None:
    """They are packaged as lossk.kernels, and loaded by `ops`."""
    for path in sorted((ROOT / "kernels").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert all(name.startswith("lossk.kernels") for name in names if name.split(".")[0] == "lossk"), path


def house_with(folder: Path, file: str, more: str, *, whole: tuple[str, ...] = ()) -> Path:
    """The house in a folder, `more` at the end of a file: every module there, empty but for this and some packages."""
    for path in modules_of(SOURCE).values():
        name = path.relative_to(SOURCE / "lossk")
        to = folder / "lossk" / name
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(path.read_text() if str(name) == file or name.parts[0] in whole else "")
    changed = folder / "lossk" / file
    changed.write_text(f"{changed.read_text()}\n\n{more}\n")
    return folder


PLANTED = [
    ("store/store.py", "from lossk.kernel.kernel import LossKernel", "{}"),
    ("kernel/kernel.py", "import lossk.samplers.sgld", "def later():\n    {}"),
    (
        "pilot/automatic.py",
        "from lossk.accumulate import panel",
        "class It:\n    async def f(self): {}",
    ),  # same floor
    ("checks.py", "from lossk.ops import philox", "def later():\n    {}"),
    ("data/data.py", "import lossk", "try:\n    {}\nexcept ImportError:\n    pass"),
]


@pytest.mark.parametrize(("file", "line", "within"), PLANTED)
def test_a_planted_back_arrow_is_found(tmp_path: Path, file: str, line: str, within: str) -> None:
    (found,) = pointing_up(read_arrows(house_with(tmp_path, file, within.format(line))))
    assert found.importer == f"lossk.{file.removesuffix('.py').replace('/', '.')}"
    typed = f"from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    {line}"
    assert not pointing_up(read_arrows(house_with(tmp_path, file, typed)))


def test_a_planted_circle_is_found(tmp_path: Path) -> None:
    line = "def later():\n    from lossk.kernel.kernel import LossKernel"
    house = house_with(tmp_path, "kernel/dense.py", line, whole=("kernel",))
    assert not pointing_up(read_arrows(house))
    (circle,) = circles(run_at_import_or_later(read_arrows(house)))
    assert {"lossk.kernel.dense", "lossk.kernel.kernel"} <= set(circle)


def test_a_module_on_no_floor_is_found(tmp_path: Path) -> None:
    house = house_with(tmp_path, "checks.py", "")
    (house / "lossk/utils.py").write_text("from lossk.kernel.kernel import LossKernel\n")
    with pytest.raises(ValueError, match=r"lossk\.utils is on no floor"):
        pointing_up(read_arrows(house))


def test_contributing_lists_the_floors() -> None:
    """`python tests/floors.py` prints the list."""
    assert as_markdown() in (ROOT / "CONTRIBUTING.md").read_text()
