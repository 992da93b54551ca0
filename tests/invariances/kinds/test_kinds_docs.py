"""docs/kinds.md names every test of a kind that there is, and no other."""

from __future__ import annotations

from pathlib import Path

import kinds_table

PAGE = Path(__file__).resolve().parents[3] / "docs" / "kinds.md"


def test_the_table_is_that_of_the_tests() -> None:
    written = [line for line in PAGE.read_text().splitlines() if line.startswith("| ") and "`test_kinds_" in line]
    there = kinds_table.rows()
    assert len(there) > 100
    assert not set(there) - set(written), "tests that the page lacks"
    assert not set(written) - set(there), "lines of the page that name no test"
    assert written == there


def test_every_file_is_in_the_table() -> None:
    files = {path.stem.removeprefix("test_kinds_") for path in Path(__file__).parent.glob("test_kinds_*.py")}
    assert files == {*kinds_table.FILES, "docs"}


def test_every_text_is_used() -> None:
    named = "\n".join(kinds_table.rows())
    assert [test for test in kinds_table.COMPARED if f"::{test}`" not in named and f"::{test}[" not in named] == []
