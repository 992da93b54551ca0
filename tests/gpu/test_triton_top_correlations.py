"""The Triton neighbors: bit for bit the reference's, with ties, dead samples, transposed tiles and negative zeros."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lossk
from lossk.forms.blocks import tile_spans, upper_triangle
from lossk.ops.top_correlations import EMPTY, merge_tile, unpack


def empty(rows: int, k: int, device: torch.device | str = "cpu") -> Tensor:
    return torch.full((rows, k), EMPTY, dtype=torch.int64, device=device)


def gains(count: int) -> Tensor:
    """1 / standard deviations over a few powers of two; every fifth sample dead."""
    gain = torch.rand(count) + 0.5
    gain[::5] = 0.0
    return gain


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("rows", "columns", "k"), [(1, 1, 1), (1, 7, 3), (7, 1, 3), (9, 131, 1), (13, 131, 16), (5, 257, 17), (3, 300, 64)]
)
def test_bit_for_bit_the_reference(
    triton_device: torch.device, rows: int, columns: int, k: int, dtype: torch.dtype
) -> None:
    row_gain, column_gain = gains(rows), gains(columns)
    got, expected = empty(rows, k, triton_device), empty(rows, k)
    for first_column in (0, columns + 3):  # two tiles, one of them with the diagonal
        # Eighths: many ties; some entries beyond [-1, 1], and both zeros.
        tile = (torch.randn(rows, columns) * 8).round().div(8).to(dtype)
        place = {"first_row": 2, "first_column": first_column}
        merge_tile(expected, tile, row_gain, column_gain, **place, backend="torch")
        on_device = [x.to(triton_device) for x in (tile, row_gain, column_gain)]
        merge_tile(got, *on_device, **place, backend="triton")
    assert torch.equal(got.cpu(), expected)
    assert (unpack(expected)[0][row_gain == 0] == -1).all()


def test_ties_go_to_the_smaller_index(triton_device: torch.device) -> None:
    tile, ones = torch.zeros(4, 300), torch.ones(300)
    tile[:, 150:] = -0.0
    keys = empty(4, 6, triton_device)
    on_device = [x.to(triton_device) for x in (tile, ones[:4], ones)]
    merge_tile(keys, *on_device, first_row=1, first_column=0, backend="triton")
    index = unpack(keys.cpu())[0]
    assert index.tolist() == [[j for j in range(7) if j != i][:6] for i in range(1, 5)]


@pytest.mark.parametrize("tile", [16, 32, 64])
def test_the_neighbors_of_a_kernel(triton_device: torch.device, tile: int) -> None:
    """Streaming over the upper triangle, each tile also transposed, gives LossKernel.neighbors exactly."""
    traces = torch.randn(2, 9, 45).abs()
    traces[:, :, 7] = 0.25  # dead
    kernel = lossk.LossKernel.from_traces(lossk.LossTraces(traces))
    spans = tile_spans(45, tile)
    variance = kernel.variance.double()
    gain = torch.where(variance > 0, variance.rsqrt(), 0.0).float()
    keys = empty(45, 5, triton_device)
    for i, j in upper_triangle(len(spans)):
        rows, columns = spans[i], spans[j]
        block = kernel[rows, columns].to(triton_device)
        for a, b, part in ((rows, columns, block), (columns, rows, block.T))[: 1 if i == j else 2]:
            mine = keys[a].clone()
            ends = {"first_row": a.start, "first_column": b.start}
            merge_tile(mine, part, gain[a].to(triton_device), gain[b].to(triton_device), **ends, backend="triton")
            keys[a] = mine
    index, correlation = unpack(keys.cpu())
    expected = kernel.neighbors(k=5)
    assert torch.equal(index, expected.index)
    torch.testing.assert_close(correlation, expected.correlation, rtol=1e-6, atol=1e-7)


def test_strided_tiles_and_far_columns(triton_device: torch.device) -> None:
    """Columns up to 2^31, of a sample index beyond 2^31 - 300; a tile that is a view at any strides."""
    wide = torch.full((21, 2 * 67), float("nan"))
    tile = wide[::3, 1::2]
    tile.copy_(torch.randn(7, 67))
    first = 2**31 - 300
    expected, got = empty(7, 4), empty(7, 4, triton_device)
    ones = torch.ones(67)
    merge_tile(expected, tile, ones[:7], ones, first_row=first, first_column=first, backend="torch")
    on_device = [wide.to(triton_device)[::3, 1::2], ones[:7].to(triton_device), ones.to(triton_device)]
    merge_tile(got, *on_device, first_row=first, first_column=first, backend="triton")
    assert torch.equal(got.cpu(), expected)
    assert (unpack(expected)[0] >= first).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "cpp"}, "backend must be one of torch, triton, got 'cpp'"),
        ({"tile": torch.zeros(3, 4).double()}, r"tile must be \[r, c\] float32 or float16"),
        ({"keys": empty(2, 2)}, r"keys must be \[3, k\] int64, contiguous, got \[2, 2\]"),
        ({"keys": empty(3, 65)}, "k must be at most 64 for backend='triton', got 65"),
        ({"row_gain": torch.ones(4)}, r"row_gain must be \[3\] float32 on cpu, got \[4\]"),
        ({"column_gain": torch.ones(4).double()}, r"column_gain must be \[4\] float32 on cpu, got .* torch.float64"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    good = {"keys": empty(3, 2), "tile": torch.zeros(3, 4), "row_gain": torch.ones(3), "column_gain": torch.ones(4)}
    with pytest.raises(ValueError, match=message):
        merge_tile(**({"first_row": 0, "first_column": 0, "backend": "triton"} | good | change))
