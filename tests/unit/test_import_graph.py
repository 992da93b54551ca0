"""The import graph of the package: read right, without circles; and what opening a store imports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import lossk
from import_graph import Arrow, circles, read_arrows, run_at_import_or_later

OPENS = """
import json, sys
import lossk
kernel = lossk.open(sys.argv[1])
kernel.neighbors(k=2)
print(json.dumps([name for name in sys.modules if name.startswith("lossk.")]))
"""


def write(source: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = source / "house" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return source


def test_every_way_of_importing_is_seen(tmp_path: Path) -> None:
    here = "from __future__ import annotations\nfrom typing import TYPE_CHECKING\n"
    source = write(
        tmp_path,
        {
            "__init__.py": "",
            "one.py": "import house.two\nimport json\n",
            "two.py": "from house import three\n",
            "three.py": "def f():\n    if True:\n        from house.four import thing\n    return thing\n",
            "four.py": f"{here}if TYPE_CHECKING:\n    from house import one\nelse:\n    import house.five\n",
            "five.py": "from . import six\nfrom .deep import seven\n",
            "six.py": "try:\n    import house.deep.seven as it\nexcept ImportError:\n    pass\n",
            "deep/__init__.py": "from . import seven\n",
            "deep/seven.py": "from ..one import x\nfrom ... import nothing\n",
        },
    )
    found = {(a.importer[6:], a.imported[6:], a.line, a.place) for a in read_arrows(source, "house")}
    assert found == {
        ("one", "two", 1, "module"),
        ("two", "three", 1, "module"),
        ("three", "four", 3, "function"),
        ("four", "one", 4, "typing"),
        ("four", "five", 6, "module"),
        ("five", "six", 1, "module"),
        ("five", "deep.seven", 2, "module"),
        ("six", "deep.seven", 2, "module"),
        ("deep", "deep.seven", 1, "module"),
        ("deep.seven", "one", 1, "module"),
    }


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        (["ab", "bc"], []),
        (["ab", "ba"], [["a", "b"]]),
        (["ab", "bc", "ca", "cd", "de", "ed", "fa"], [["a", "b", "c"], ["d", "e"]]),
        (["ab", "ac", "bd", "cd"], []),
    ],
)
def test_circles(pairs: list[str], expected: list[list[str]]) -> None:
    assert circles(Arrow(a, b, 1, "module") for a, b in pairs) == expected


def test_no_module_imports_in_a_circle() -> None:
    """Within functions or not."""
    arrows = run_at_import_or_later(read_arrows())
    assert len(arrows) > 500
    assert any(arrow.place == "function" for arrow in arrows)
    assert circles(arrows) == []


def test_opening_a_store_imports_no_sampler(tmp_path: Path) -> None:
    losses = np.random.default_rng(3).normal(size=(2, 6, 9))
    lossk.LossTraces(losses).save(tmp_path / "k.lossk")
    command = [sys.executable, "-W", "error", "-c", OPENS, str(tmp_path / "k.lossk")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    imported = json.loads(done.stdout)
    kinds = {kind.__module__ for kind in (lossk.SGLD, lossk.BAOAB, lossk.HMC, lossk.Laplace, lossk.Gaussian)}
    assert lossk.LossKernel.__module__ in imported
    assert not kinds & set(imported)
    assert not [name for name in imported if name.rpartition(".")[2] in ("chain", "task", "pilot", "tune", "run")]


@pytest.mark.parametrize("name", [*lossk.__all__, "open", "analysis", "interop", "kernels", "ops", "recipes", "report"])
def test_public_names_are_there_before_anything_is_imported(name: str) -> None:
    found = getattr(lossk, name)
    assert name in dir(lossk)
    assert getattr(lossk, name) is found
    if name in lossk.__all__:
        assert found.__name__ == name


def test_other_names_are_not() -> None:
    for name in ("nothing", "open_kernel", "np"):
        with pytest.raises(AttributeError, match=f"'lossk' has no attribute '{name}'"):
            getattr(lossk, name)


def test_all_is_what_can_be_imported() -> None:
    names = {name for names in lossk.MODULES.values() for name in names}
    assert names == {*lossk.__all__, "open_kernel"}


def test_names_to_complete_are_the_public_ones() -> None:
    """After a sampler and a store have been used, too: modules that these import are not offered."""
    assert set(dir(lossk)) == {*lossk.__all__, *lossk.PACKAGES, "open", "__version__"}
