"""What is foreseen of a kernel's methods, against what is counted; refusals in words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lossk
from lossk.analysis import class_similarity
from lossk.forms.blocks import TileBlocks, tile_spans
from lossk.kernel import read_memory
from lossk.kernel.kernel import LossKernel
from lossk.plan.pass_memory import peak_of
from lossk.report.findings import check_memory
from lossk.report.matrix import binned_correlation
from lossk.report.page import write_report
from lossk.report.samples import Samples

N, TILE = 900, 256
LABELS = torch.arange(N, device="cpu") % 7
METHODS: dict[str, Callable[[LossKernel], Any]] = {
    "neighbors": lambda kernel: kernel.neighbors(5),
    "anti": lambda kernel: kernel.neighbors(5, anti=True),
    "rows": lambda kernel: kernel.neighbors(5, rows=range(300)),
    "matvec": lambda kernel: kernel.matvec(torch.ones(N, 4, dtype=torch.float64, device="cpu")),
    "eigsh": lambda kernel: kernel.eigsh(3),
    "block": lambda kernel: kernel[100:800],
    "correlation": lambda kernel: kernel.correlation(range(100, 800)),
    "to_numpy": lambda kernel: kernel.to_numpy(),
    "class means": lambda kernel: class_similarity(kernel, LABELS, list("abcdefg"), num_bootstrap=30),
    "matrix": lambda kernel: binned_correlation(kernel, np.arange(N), N),
}


@pytest.fixture(scope="module")
def kernels() -> dict[str, LossKernel]:
    generator = torch.Generator(device="cpu").manual_seed(5)
    traces = lossk.LossTraces(torch.rand(2, 30, N, generator=generator, dtype=torch.float32, device="cpu"))
    factor = LossKernel.from_traces(traces)
    spans, blocks = tile_spans(N, TILE), factor.contents.blocks
    index = [torch.arange(span.start, span.stop, device="cpu") for span in spans]
    tiles = {(i, j): blocks.gather(index[i], index[j]) for i in range(len(spans)) for j in range(i, len(spans))}
    return {"factor": factor, "tiles": LossKernel(TileBlocks(N, TILE, tiles), factor.contents.moments)}


@pytest.mark.parametrize("form", ["factor", "tiles"])
@pytest.mark.parametrize("name", METHODS)
def test_foreseen(name: str, form: str, kernels: dict[str, LossKernel], monkeypatch: pytest.MonkeyPatch) -> None:
    foreseen: list[int] = []
    monkeypatch.setattr(read_memory, "refuse", lambda needed, *_: foreseen.append(needed))
    if name == "matrix":
        monkeypatch.setattr(read_memory, "PAGE_BYTES", 0)
        check_memory(kernels[form], Samples())
    found = peak_of(lambda: METHODS[name](kernels[form]))
    assert 0 < found <= max(foreseen)


@pytest.mark.parametrize("form", ["factor", "tiles"])
@pytest.mark.parametrize("name", [name for name in METHODS if name != "matrix"])
def test_refused(name: str, form: str, kernels: dict[str, LossKernel], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_memory, "SMALL", 0)
    monkeypatch.setattr("psutil.virtual_memory", type("Free", (), {"available": 1000}))
    with pytest.raises(MemoryError, match=r"needs? .* and .*(free|available); "):
        METHODS[name](kernels[form])


def test_a_report_is_refused_before_any_work(
    kernels: dict[str, LossKernel], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", type("Free", (), {"available": 10**8}))
    monkeypatch.setattr("lossk.report.page.find", lambda *_, **__: pytest.fail("work has begun"))
    with pytest.raises(MemoryError, match=r"a report on 900 samples needs .* and .* free; "):
        write_report(kernels["tiles"], tmp_path / "k.html", labels=LABELS)
