"""`python -m bench.interop`, tiny and without the peers: that it runs. No times."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import interop


def test_a_tiny_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = tmp_path / "interop.json"
    sizes = ["--num-samples", "30", "--num-draws", "5", "--widths", "8", "--rounds", "1"]
    interop.main([*sizes, "--record", str(record)])
    page, found = capsys.readouterr().out, json.loads(record.read_text())["found"]
    assert page.strip() == interop.section(found)
    assert [row["call"] for row in found] == ["influence", "step"]
    assert "nan" not in page
