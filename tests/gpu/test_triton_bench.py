"""bench.gpu: refuses without a GPU, runs to its end in the interpreter at tiny sizes, and judges as it says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import gpu, gpu_build, gpu_cases
from bench.gpu_targets import judge


def test_refuses_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "no CUDA device; there is nothing to measure" in capsys.readouterr().err
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert gpu.main(["--tiny"]) == 2
    assert "set TRITON_INTERPRET=1" in capsys.readouterr().err


def test_the_whole_of_it_tiny(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gpu.json"
    assert gpu.main(["--tiny", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert {row["op"].split(",")[0] for row in record["ops"]["rows"]} == {
        "sample_loss", "head_loss", "panel of 2 heads", "rank_update", "top_correlations", "sgld_step"
    }  # fmt: skip
    assert all(row["median_ms"] > 0 and row["of_limit"] > 0 for row in record["ops"]["rows"])
    assert {verdict["op"].split(",")[0] for verdict in record["ops"]["targets"]} == {
        "rank_update", "head_loss", "sgld_step"
    }  # fmt: skip
    build = record["build"]
    assert set(build["stages"]) == {"forward", "gradient", "step", "update"}
    assert build["thousand_draws_seconds"] == pytest.approx(1000 * sum(build["stages"].values()))
    assert build["sampling"]["turns"] > 0
    assert set(build["ops"].values()) == {"triton"}
    assert build["passes"]["fused_head"] is True
    assert "no measure of speed" in record["device"] or torch.cuda.is_available()
    assert "of the limit" in capsys.readouterr().out


def row(op: str, name: str, median: float, of_limit: float = 1.0, peak: int = 0) -> dict[str, Any]:
    return {"op": op, "name": name, "median_ms": median, "of_limit": of_limit, "peak_bytes": peak}


def test_targets_are_met_or_missed_by_what_was_measured() -> None:
    head = "head_loss, 1,000 classes"
    good = [
        row("rank_update, bf16, k = 64", "lossk", 1.0, 0.91), row("rank_update, bf16, k = 64", "torch.addmm_", 1.8),
        row(head, "lossk", 1.0, peak=5), row(head, "torch", 1.1), row(head, "liger", 1.0),
        row("sgld_step, 9 parameters", "lossk", 1.0, 0.86), row("sgld_step, 9 parameters", "floor", 1.0),
    ]  # fmt: skip
    assert [verdict.met for verdict in judge(good, {head: 100.0})] == [True] * 5
    bad = [
        row("rank_update, bf16, k = 64", "lossk", 1.0, 0.89), row("rank_update, bf16, k = 64", "torch.addmm_", 1.6),
        row(head, "lossk", 1.2, peak=50), row(head, "torch", 1.1), row(head, "liger", 1.3),
        row("sgld_step, 9 parameters", "lossk", 1.0, float("nan")),
    ]  # fmt: skip
    verdicts = judge(bad, {head: 100.0})
    assert [verdict.met for verdict in verdicts] == [False] * 5
    assert "MISSED" in str(verdicts[0])
    assert "no slower than the fastest other (torch)" in verdicts[2].target


def test_a_failed_contender_is_a_row_and_ours_a_missed_target(capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> None:
        raise RuntimeError("no kernel image\nfor this device")

    of = {"copy": 1e9, "bf16": 1e12}
    found = gpu.time_case(gpu_cases.Case("sgld_step, 9 parameters", "lossk", broken), of, torch.device("cpu"))
    assert found["error"] == "RuntimeError: no kernel image"
    assert json.loads(json.dumps(found))["median_ms"] is None
    verdicts = judge([found, row("sgld_step, 9 parameters", "floor", 1.0)], {})
    assert [(verdict.target, verdict.met) for verdict in verdicts] == [("runs", False)]
    assert "failed: RuntimeError: no kernel image" in capsys.readouterr().out


def test_limits_are_bytes_or_flops_whichever_takes_longer() -> None:
    """A rank-k update of a triangle moves 4 N^2 bytes and computes N^2 k flops: at few rows the bytes decide."""
    of = {"copy": 4e12, "bf16": 735e12}
    few, many = (gpu_cases.Case("u", "lossk", list, bytes=4e6, flops=1e6 * k) for k in (64, 4096))
    assert gpu.limit_of(few, of) == (pytest.approx(1e-3), "memory")
    assert gpu.limit_of(many, of) == (pytest.approx(4096e9 / 735e12), "products")
    sizes = gpu_cases.Sizes(samples=320, ranks=(2,), precisions=("bf16", "tf32x3"))
    for case in gpu_cases.update_cases(sizes, torch.device("cpu")):
        entries = 320**2 * (1 if case.name == "lossk" else 2)
        assert case.bytes == 4 * entries + 2 * 320 * (2 if "bf16" in case.op else 4)
        assert case.flops == entries * 2


def test_the_record_is_written_after_every_case(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"

    def cases(sizes: object, device: object) -> Iterator[gpu_cases.Case]:
        yield gpu_cases.Case("sgld_step, 1 parameters", "lossk", list, bytes=1.0)
        assert [each["name"] for each in json.loads(out.read_text())["ops"]["rows"]] == ["lossk"]
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_cases, "all_cases", cases)
    with pytest.raises(KeyboardInterrupt):
        gpu.main(["--tiny", "--out", str(out), "--part", "ops"])
    assert len(json.loads(out.read_text())["ops"]["rows"]) == 1


def test_the_network_is_of_googlenets_size() -> None:
    model = gpu_build.network(1000, 1.0).eval()
    assert sum(p.numel() for p in model.parameters()) == 7_005_832
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)
