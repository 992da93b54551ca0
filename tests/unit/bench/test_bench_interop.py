"""`python -m bench.interop`, tiny and without the peers: that it runs. No times."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from bench import interop, interop_call


def test_a_tiny_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def run_here(python: str, spec: dict[str, Any]) -> dict[str, Any]:
        """As `interop.run`, without a process of its own, which would spend its time importing torch."""
        path, out = tmp_path / "spec.json", io.StringIO()
        path.write_text(json.dumps(spec))
        with contextlib.redirect_stdout(out):
            interop_call.main(str(path))
        return json.loads(out.getvalue())

    monkeypatch.setattr(interop, "run", run_here)
    record = tmp_path / "interop.json"
    sizes = ["--num-samples", "30", "--num-draws", "5", "--widths", "8", "--rounds", "1"]
    interop.main([*sizes, "--record", str(record)])
    page, found = capsys.readouterr().out, json.loads(record.read_text())["found"]
    assert page.strip() == interop.section(found)
    assert [row["call"] for row in found] == ["influence", "step"]
    assert "nan" not in page
