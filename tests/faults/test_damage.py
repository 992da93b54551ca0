"""Every file of a store, damaged in every way: named, or harmless; never other numbers, nor somebody else's error."""

from __future__ import annotations

from pathlib import Path

from damage_table import as_table, cases


def test_every_damage_is_named_or_harmless(tmp_path: Path) -> None:
    """Of a finished store, `verify` names every one; of an unfinished one, what cannot just be made again."""
    found = list(cases(tmp_path))
    assert len(found) > 1000
    assert [case for case in found if case.read.startswith(("silent", "raw"))] == []
    finished = [case for case in found if case.store not in ("stopped", "making")]
    assert [case for case in finished if case.verified != "named"] == []
    losses = [case for case in found if case.store == "stopped" and case.file.startswith(("losses/c", "state-"))]
    assert [case for case in losses if case.verified != "named"] == []
    assert "silent | raw" in as_table(found)
