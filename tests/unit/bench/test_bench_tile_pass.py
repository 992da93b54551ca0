"""`python -m bench.tile_pass`, tiny: that it makes every tile and leaves nothing behind. No times."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench import tile_pass


def test_a_tiny_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = ["--num-samples", "300", "--num-draws", "5", "--panel", "3", "--tile", "64", "--memory-mb", "8"]
    tile_pass.main([*counts, "--folder", str(tmp_path)])
    page = capsys.readouterr().out
    assert page.startswith("300 samples, 4 x 5 draws, 15 tiles of 64: ")
    assert "nan" not in page
    assert list(tmp_path.iterdir()) == []


def test_all_draws_are_in_the_log(tmp_path: Path) -> None:
    made = tile_pass.Pass(num_samples=50, num_draws=7, tile=16, panel=3)
    log = tile_pass.write_log(made, tmp_path / "k.lossk")
    try:
        assert log.unfinished() == {}
        assert (log.read_panel(log.commits[-1]) == tile_pass.losses_of(made, 3, 7)[6:]).all()
    finally:
        log.close()
