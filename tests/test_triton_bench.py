"""bench.gpu: refuses without a GPU, runs to its end in the interpreter at tiny sizes, and judges as it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import gpu, gpu_build
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
        row("rank_update, bf16, k = 64", "lossk", 1.0, 0.91), row("rank_update, bf16, k = 64", "torch.mm", 1.8),
        row(head, "lossk", 1.0, peak=5), row(head, "torch", 1.1), row(head, "liger", 1.0),
        row("sgld_step, 9 parameters", "lossk", 1.0, 0.86), row("sgld_step, 9 parameters", "floor", 1.0),
    ]  # fmt: skip
    assert [verdict.met for verdict in judge(good, {head: 100.0})] == [True] * 5
    bad = [
        row("rank_update, bf16, k = 64", "lossk", 1.0, 0.89), row("rank_update, bf16, k = 64", "torch.mm", 1.6),
        row(head, "lossk", 1.2, peak=50), row(head, "torch", 1.1), row(head, "liger", 1.3),
        row("sgld_step, 9 parameters", "lossk", 1.0, float("nan")),
    ]  # fmt: skip
    verdicts = judge(bad, {head: 100.0})
    assert [verdict.met for verdict in verdicts] == [False] * 5
    assert "MISSED" in str(verdicts[0])
    assert "no slower than the fastest other (torch)" in verdicts[2].target


def test_the_network_is_of_googlenets_size() -> None:
    model = gpu_build.network(1000, 1.0).eval()
    assert sum(p.numel() for p in model.parameters()) == 7_005_832
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)
