"""`python -m bench.factor`, tiny: that it runs, finds what is planted and leaves nothing behind. No times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench import factor


def test_a_tiny_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = tmp_path / "factor.json"
    counts = ["--num-samples", "1203", "--num-draws", "80", "--num-rows", "30", "--threads", "1"]
    factor.main([*counts, "--folder", str(tmp_path), "--record", str(record)])
    page, found = capsys.readouterr().out, json.loads(record.read_text())["found"]
    assert page.strip() == factor.section(found)
    assert list(found["stages"]) == ["write", "open", "read", "near block", "far block", "matvec", "eigsh", "neighbors"]
    assert found["same_group"] > 0.95
    assert len(found["eigenvalues"]) == 10
    assert "nan" not in page
    assert [path.name for path in tmp_path.iterdir()] == ["factor.json"]
