"""The benchmark of preparation runs, and its page says what it found."""

from __future__ import annotations

from bench import preparation


def test_preparation() -> None:
    rows = [preparation.measure("decoder", part, settings, "tiny") for part, settings in
            (("late", "auto"), ("whole", "numbers"))]  # fmt: skip
    assert all(row["preparation"] > 0 < row["run"] for row in rows)
    text = preparation.page(rows)
    assert text.count("| decoder |") == 2
    assert "nan" not in text
