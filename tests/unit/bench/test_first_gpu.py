"""bench.first_gpu: stages in processes of their own, cut off one by one, and what each finds, on a stand-in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bench import first_gpu, first_gpu_stages
from bench.first_gpu import OPS, STAGES, Stage, groups, run_all

from lossk.ops import triton_kernels

ROOT = Path(__file__).resolve().parents[3]
ONE_PROCESS = "versions", "small_build", "repeat", "default_sampler", "forward"


def test_the_limits_fit_into_eight_minutes_of_stages_that_take_half_of_theirs() -> None:
    longest = [max(stage.seconds for stage in together) for together in groups(STAGES)]
    assert 0.5 * sum(longest) <= 480
    assert len(longest) == len(STAGES) - len(OPS) + 1  # the self-tests run at the same time
    assert set(OPS) == set(triton_kernels.OPS)
    assert {stage.name.partition(":")[0] for stage in STAGES} == set(first_gpu_stages.STAGES)


def test_a_stage_that_fails_or_hangs_costs_the_others_nothing(tmp_path: Path) -> None:
    """Stages in plain Python: what is written before a stage is cut off stays, and the rest still runs."""
    code = (
        "import sys, time; name = sys.argv[-1]; print('said', name, flush=True)\n"
        "time.sleep(60 if name == 'hangs' else 0); sys.exit(name == 'fails')"
    )
    stages = [Stage("fails", 30), Stage("hangs", 2), Stage("a:b", 30, True), Stage("c", 30, True), Stage("late", 30)]
    summary = run_all(stages, [sys.executable, "-c", code], tmp_path, 20)
    states = {name: how["state"] for name, how in summary.items()}
    assert states == {"fails": "failed", "hangs": "out of time", "a:b": "ok", "c": "ok", "late": "ok"}
    assert summary["hangs"]["seconds"] < 15
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert (tmp_path / "hangs.log").read_text().startswith("said hangs")
    assert (tmp_path / "a-b.log").read_text() == "said a:b\n"
    again = run_all(stages[:1], [sys.executable, "-c", code], tmp_path, 0.5)
    assert again["fails"]["state"] == "not started"


def found(name: str, out: Path) -> dict[str, Any]:
    first_gpu_stages.run(name, out, tiny=True, standin=True)
    return json.loads((out / f"{name.replace(':', '-')}.json").read_text())


@pytest.mark.parametrize("name", ONE_PROCESS)
def test_a_stage_writes_what_it_finds(name: str, tmp_path: Path) -> None:
    record = found(name, tmp_path)
    assert record["seconds"] >= 0
    if name == "versions":
        assert record["device"] == "stand-in"
        assert record["missing"] == []
    if name == "small_build":
        assert record["None"]["off_by"] <= 1e-4
        assert 0 <= record["bf16"]["off_by"] <= 1.0
    if name == "repeat":
        assert record["default"] == record["deterministic"] == {"same": True, "off_by": 0.0}
    if name == "default_sampler":
        assert "auto" not in record["sampler"].values()
        assert "R-hat" in record["diagnostics"] or "rhat" in record["diagnostics"]
    if name == "forward":
        assert len(record["rows"]) >= 8
        assert all(row["images_per_second"] > 0 for row in record["rows"]), record["rows"]


def test_what_a_stage_has_found_is_there_when_it_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stage(bench: first_gpu_stages.Bench) -> None:
        bench.write({"first": 1})
        assert json.loads((tmp_path / "ops.json").read_text()) == {"first": 1}
        raise KeyboardInterrupt

    monkeypatch.setitem(first_gpu_stages.STAGES, "ops", stage)
    with pytest.raises(KeyboardInterrupt):
        found("ops", tmp_path)
    assert json.loads((tmp_path / "ops.json").read_text()) == {"first": 1}


def test_a_kernel_that_cannot_run_fails_its_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = triton_kernels.KernelStatus(False, "no ptxas", False)
    monkeypatch.setattr(triton_kernels, "status", lambda op, device: refused)
    with pytest.raises(SystemExit, match="sgld_step: no ptxas"):
        found("self_test:sgld_step", tmp_path)
    assert json.loads((tmp_path / "self_test-sgld_step.json").read_text())["reason"] == "no ptxas"


def test_a_stage_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        first_gpu.main(["--only", "nothing"])
    assert "--only must name stages, got nothing" in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_command(tmp_path: Path) -> None:
    """Minutes: each process interprets the kernels' self-tests anew."""
    subprocess.run(
        [sys.executable, "-m", "bench.first_gpu", "--tiny", "--standin", "--minutes", "30", "--out", str(tmp_path)],
        cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, check=False, timeout=1800,
    )  # fmt: skip
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary) == {stage.name for stage in STAGES}
    assert not [name for name, how in summary.items() if how["state"] == "failed"], summary
