"""Optional packages: what is missing is named, with what installs it."""

from __future__ import annotations

import sys
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
