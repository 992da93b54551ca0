"""Offsets past 2^31 elements in every kernel that takes strides: rows, heads and panels 2^30 elements apart.

The storages are sparse files: only the pages that are touched exist. `rank_update` has its own such test.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lossk.ops.head_loss import head_loss
from lossk.ops.sample_loss import sample_loss
from lossk.ops.top_correlations import EMPTY, merge_tile

FAR = 2**30


@pytest.fixture(autouse=True)
def in_host_memory(triton_device: torch.device) -> None:
    if triton_device.type != "cpu":
        pytest.skip("the files are mapped in host memory")


def far(path: Path, values: Tensor) -> Tensor:
    """The values with their first dimension FAR elements apart."""
    inner = values[0].numel()
    whole = torch.from_file(str(path), shared=True, size=(len(values) - 1) * FAR + inner, dtype=values.dtype)
    spread = whole.as_strided(values.shape, (FAR, *values[0].contiguous().stride()))
    spread.copy_(values)
    return spread


def test_sample_loss(tmp_path: Path) -> None:
    logits, targets = torch.randn(4, 7).half(), torch.tensor([0, 6, 3, -100])
    expected, found = torch.zeros(4), far(tmp_path / "out", torch.full((4,), -1.0))
    sample_loss(logits, targets, expected, backend="triton")
    sample_loss(far(tmp_path / "logits", logits), targets, found, backend="triton")
    assert torch.equal(found.clone(), expected)


def test_head_loss(tmp_path: Path) -> None:
    """Hidden states, heads and the rows of the panel far apart: k C d passes 2^31 from 64 heads of 32,768 classes."""
    hidden, heads, targets = torch.randn(4, 16).half(), torch.randn(3, 5, 16).half(), torch.tensor([0, 4, 2, 1])
    expected, found = torch.zeros(3, 4), far(tmp_path / "out", torch.full((3, 4), -1.0))
    head_loss(hidden, heads, targets, expected, backend="triton")
    spread = far(tmp_path / "hidden", hidden), far(tmp_path / "heads", heads)
    head_loss(*spread, targets, found, backend="triton")
    assert torch.equal(found.clone(), expected)


def test_top_correlations(tmp_path: Path) -> None:
    tile, gain = torch.randn(4, 9).half(), torch.ones(9)
    keys = [torch.full((4, 3), EMPTY) for _ in range(2)]
    for out, block in zip(keys, (tile, far(tmp_path / "tile", tile)), strict=True):
        merge_tile(out, block, gain[:4], gain, first_row=0, first_column=50, backend="triton")
    assert torch.equal(*keys)
    assert (keys[0] != EMPTY).all()
