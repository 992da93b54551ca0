"""Every kernel and configuration compiles for sm_80 and sm_90, without a GPU, without spills, within shared memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from bench.aot import MODULES, SHARED, Resources, cases, sources_digest

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "docs" / "aot.md"


def configurations(page: str) -> set[str]:
    """The kernel and configuration columns of a table's rows."""
    return {"|".join(line.split("|")[1:3]) for line in page.splitlines() if line.startswith("| `")}


def compiled(tmp_path: Path, *options: str) -> set[str]:
    """In a process of its own, without the interpreter, into a cache of its own; fails on a spill."""
    out = tmp_path / "aot.md"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    told = subprocess.run(
        [sys.executable, "-m", "bench.aot", "--out", out, *options],
        cwd=ROOT,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert told.returncode == 0, told.stdout[-2000:] + told.stderr[-2000:]
    return configurations(out.read_text())


@pytest.mark.slow
def test_every_configuration_compiles_without_spills(tmp_path: Path) -> None:
    """A minute and a half. `make test` has the two below: the page is of these very kernels, and none of it spills."""
    assert compiled(tmp_path) == configurations(COMMITTED.read_text()), "write docs/aot.md again: make aot"


def test_the_page_is_of_these_kernels() -> None:
    """It says of which sources it is, has every configuration, and none of them spills."""
    page = COMMITTED.read_text()
    assert f"`{sources_digest()}`" in page, "the kernels changed since: make aot"
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| `")]
    assert len(SHARED) * len(rows) == len(cases())
    assert all(row[4:6] == ["0", "0"] for row in rows)
    assert all(int(row[6 + i].replace(",", "")) <= most for row in rows for i, most in enumerate(SHARED.values()))


def test_each_modules_first_configuration_compiles_without_spills(tmp_path: Path) -> None:
    found = compiled(tmp_path, "--first")
    assert len(found) == len(MODULES)
    assert found < configurations(COMMITTED.read_text())


def test_spills_and_too_much_shared_memory_are_faults() -> None:
    def resources(architecture: int, spills: int, shared: int) -> Resources:
        return Resources("m", "k", "c", architecture, 255, spills, shared)

    assert resources(80, 0, SHARED[80]).fault == ""
    assert resources(80, 8, 0).fault == "spills 8 bytes"
    assert "shared memory" in resources(80, 0, SHARED[90]).fault
    assert resources(90, 0, SHARED[90]).fault == ""


def test_refused_in_the_interpreter() -> None:
    told = subprocess.run(
        [sys.executable, "-m", "bench.aot"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert told.returncode == 2
    assert "TRITON_INTERPRET" in told.stderr


def test_a_launch_compiles_what_was_compiled_ahead(tmp_path: Path) -> None:
    """The types Triton finds at a launch, and what it specialises on, are those of `configs()`."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    told = subprocess.run(
        [sys.executable, "-m", "tests.triton_launches"],
        cwd=ROOT,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert told.returncode == 0, told.stderr[-2000:]
    assert told.stdout == "ok\n"
