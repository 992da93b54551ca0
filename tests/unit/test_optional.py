"""Optional packages: what is missing is named, with what installs it."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

import lossk
from lossk.errors import MissingPackageError
from lossk.optional import check_installed, require


def test_a_module_that_is_there() -> None:
    assert require("xml.dom", "arviz") is sys.modules["xml.dom"]
    check_installed("xml.dom", "arviz", "a table")


@pytest.mark.parametrize("kind", [lossk.LosskError, ImportError])
def test_a_missing_package_is_named(kind: type[Exception]) -> None:
    """The command line knows it as one of lossk's errors, other programs as Python's."""
    with pytest.raises(kind, match=r'^this needs no_such_package: pip install "lossk\[arviz\]"$'):
        require("no_such_package.module", "arviz")
    with pytest.raises(kind, match=r'^a map needs umap-learn: pip install "lossk\[analysis\]"$'):
        check_installed("no_such_package", "analysis", "a map", package="umap-learn")


def test_a_package_that_lacks_something_says_so_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_a_package.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_package") as found:
        require("half_a_package", "arviz")
    assert not isinstance(found.value, MissingPackageError)


def asked_for() -> set[tuple[str, str]]:
    """(package, extra) of every call of the two in lossk's source."""
    found = set()
    for path in Path(lossk.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else None
            if called not in ("require", "check_installed") or not isinstance(node.args[0], ast.Constant):
                continue
            module, extra = (argument.value for argument in node.args[:2])
            named = [keyword.value.value for keyword in node.keywords if keyword.arg == "package"]
            found.add((named[0] if named else module.partition(".")[0], extra))
    return found


def installed_by(extra: str, extras: dict[str, list[str]]) -> set[str]:
    """The packages that an extra names, those of extras within it too."""
    names = set()
    for requirement in extras[extra]:
        name, inner = re.match(r"([\w-]+)(?:\[([\w,]+)\])?", requirement).groups()
        names |= {name} if name != "lossk" else {p for e in inner.split(",") for p in installed_by(e, extras)}
    return names


def test_the_extra_that_an_error_names_installs_the_package() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    asked = asked_for()
    assert {("lightning", "lightning"), ("numcodecs", None), ("google-crc32c", None), ("arviz-stats", None)} <= asked
    assert len(asked) > 10
    extras = {**project["optional-dependencies"], None: project["dependencies"]}  # None: lossk itself
    wrong = {(p, e) for p, e in asked if p not in installed_by(e, extras)}
    assert not wrong
