"""The benchmark of late blocks, tiny: that it runs, and that frozen modules are kept in each of its cases."""

from __future__ import annotations

from bench import late_blocks
from bench.options import Options


def test_late_blocks() -> None:
    found = late_blocks.measure(Options(size="tiny", threads=1))
    assert set(found["blocks"]) == {"decoder", "encoder", "vision transformer"}
    assert all("= cached" in case["said"][0] for case in found["blocks"].values())
    text = late_blocks.section(found)
    assert "vision transformer" in text
    assert "nan" not in text
