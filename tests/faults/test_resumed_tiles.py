"""Committed tiles of a run that is resumed: one that is gone, or not what was written, is made again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.unit.accumulate.test_out_of_core import Build, Same, stop_after

from lossk.plan.layout import in_store
from lossk.store.verify import verify_store

DAMAGES = ["gone", "empty", "cut", "grown", "first byte", "middle", "last byte", "another tile", "zeros"]


def damage(file: Path, kind: str) -> None:
    content = bytearray(file.read_bytes())
    if kind == "gone":
        file.unlink()
        return
    at = {"first byte": 0, "middle": len(content) // 2, "last byte": len(content) - 1}
    if kind in at:
        content[at[kind]] ^= 4
    elif kind == "another tile":
        content = bytearray((file.parent / "1").read_bytes())
    else:
        content = {
            "empty": bytearray(),
            "cut": content[:-7],
            "grown": content + b"x",
            "zeros": bytearray(len(content)),
        }[kind]
    file.write_bytes(content)


@pytest.mark.parametrize("sealed", [True, False])
def test_a_committed_tile_that_is_damaged_is_made_again(
    build: Build,
    problem: Any,
    assert_same_kernel: Same,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    sealed: bool,
) -> None:
    """Whether its line in the log says what was written, as this version's does, or only that it was."""
    monkeypatch.setattr(
        "lossk.run.cost.choose_layout",
        lambda size, _, taken, **__: in_store(size, taken, super_panel=size.draws, stripes=1),
    )
    whole, stopped = build(problem.model(), problem.data, out=tmp_path / "whole.lossk"), tmp_path / "stopped.lossk"
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(OSError, match="says the test"):
            build(problem.model(), problem.data, out=stopped)
    lines = [json.loads(line) for line in (stopped / "tiles.jsonl").read_text().splitlines()]
    assert len(lines) == 2, "two tiles are committed"
    if not sealed:
        (stopped / "tiles.jsonl").write_text("".join(f"{json.dumps(line['tile'])}\n" for line in lines))
    for kind in DAMAGES:
        if kind == "another tile" and not sealed:  # of an earlier version, it cannot be told
            continue
        path = tmp_path / f"{kind}.lossk"
        shutil.copytree(stopped, path)
        damage(path / "tiles" / "c" / "0" / "0", kind)
        assert_same_kernel(build(problem.model(), problem.data, out=path, resume=True), whole)
        assert verify_store(path).ok, kind
