"""bench.gpu: refuses without a GPU, and its cases run (in the interpreter, at tiny sizes)."""

from __future__ import annotations

import sys

import pytest
import torch
from bench import gpu


def test_refuses_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench.gpu"])
    assert gpu.main() == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_every_case_runs(triton_device: torch.device) -> None:
    sizes = gpu.Sizes(samples=33, ranks=(3,), batch=5, classes=(7,), depth=16, parameters=(65,), tile=17)
    cases = list(gpu.all_cases(sizes, triton_device))
    for case in cases:
        case.run()
        assert case.bytes > 0 or case.flops > 0
    assert {case.op.split(",")[0] for case in cases} == {
        "sample_loss", "head_loss", "rank_update", "top_correlations", "sgld_step"
    }  # fmt: skip
