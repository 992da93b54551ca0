"""The Triton rank-k update: its schedule, every precision against float64, strides, and rows past 2^31 elements."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from lossk.kernels.launch import COMPILED_AS
from lossk.kernels.schedule import rectangle_block, triangle_block
from lossk.ops.rank_update import HALF, PRECISIONS, rank_update, rank_update_triangle

# Unit roundoff of the factors of a product. tf32x3 keeps 22 bits of them, and drops the product of two low parts.
FACTOR = {"fp32": 2.0**-24, "tf32": 2.0**-11, "tf32x3": 2.0**-21, "fp16": 2.0**-11, "bf16": 2.0**-8}
# Triton's interpreter cuts float32 to bfloat16 where a GPU rounds to nearest: rows centered at the load meet it.
CUT = {**FACTOR, "bf16": 2.0**-7}


@triton.jit
def schedule_kernel(out_ptr, rows, columns, total, TRIANGLE: tl.constexpr, GROUP: tl.constexpr):
    for t in range(tl.program_id(0), total, tl.num_programs(0)):
        if TRIANGLE:
            i, j = triangle_block(t, rows, GROUP)
        else:
            i, j = rectangle_block(t, rows, columns, GROUP)
        tl.store(out_ptr + 2 * t, i)
        tl.store(out_ptr + 2 * t + 1, j)


def visited(rows: int, columns: int, total: int, triangle: bool, group: int, device: torch.device) -> Tensor:
    out = torch.full((total, 2), -1, dtype=torch.int32, device=device)
    schedule_kernel[(1,)](out, rows, columns, total, TRIANGLE=triangle, GROUP=group, **COMPILED_AS)
    return out.cpu()


@pytest.mark.parametrize("group", [1, 2, 3, 8])
@pytest.mark.parametrize("blocks", [1, 2, 3, 7, 8, 9, 17])
def test_every_block_of_a_triangle_once(triton_device: torch.device, blocks: int, group: int) -> None:
    order = visited(blocks, blocks, blocks * (blocks + 1) // 2, True, group, triton_device)
    assert {(i, j) for i, j in order.tolist()} == {(i, j) for j in range(blocks) for i in range(j + 1)}
    # A group's blocks come together: the group never decreases.
    assert (order[:, 1].div(group, rounding_mode="floor").diff() >= 0).all()


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 5), (5, 1), (3, 8), (4, 11)])
def test_every_block_of_a_rectangle_once(triton_device: torch.device, rows: int, columns: int) -> None:
    order = visited(rows, columns, rows * columns, False, 4, triton_device)
    assert {(i, j) for i, j in order.tolist()} == {(i, j) for i in range(rows) for j in range(columns)}


@triton.jit
def corners_kernel(out_ptr, first, blocks, BLOCK: tl.constexpr):
    t = first + tl.arange(0, BLOCK)
    i, j = triangle_block(t, blocks, 8)
    tl.store(out_ptr + tl.arange(0, BLOCK), (i + j.to(tl.int64) * 32768))


def test_the_largest_triangle(triton_device: torch.device) -> None:
    """Around block 2^28 the square root in the enumeration must still be right: N = 1.5 million at a side of 64."""
    blocks, first = 24_000, 2**28 - 2**20
    out = torch.full((4096,), -1, dtype=torch.int64, device=triton_device)
    corners_kernel[(1,)](out, first, blocks, BLOCK=4096, **COMPILED_AS)
    i, j = out.cpu() % 32768, out.cpu() // 32768
    start, width = j // 8 * 8, 8
    assert len(set(out.tolist())) == 4096
    assert (i <= j).all()
    t = start * (start + 1) // 2 + torch.where(i < start, i * width + j - start, start * width + 0 * i)
    above = i < start
    assert torch.equal(t[above], (first + torch.arange(4096))[above])


def panel(k: int, columns: int) -> Tensor:
    return torch.randn(k, columns) * 10.0 ** torch.linspace(-1, 1, columns)


def assert_sums(got: Tensor, start: Tensor, left: Tensor, right: Tensor, factor: float, where: Tensor) -> None:
    """|error| <= (k + 4) float32 roundings of the sum of absolute terms, and two roundings per factor."""
    wide_left, wide_right = left.double(), right.double()
    expected = start.double() + torch.where(where, wide_left.T @ wide_right, 0.0)
    size = wide_left.abs().T @ wide_right.abs() + start.double().abs()
    bound = ((len(left) + 4) * 2.0**-24 + 2 * factor) * size
    if got.dtype == torch.float16:
        bound = bound + 2.0**-11 * expected.abs() + 2.0**-25
    assert ((got.double() - expected).abs() <= bound).all()
    assert torch.equal(got[~where], start[~where])


SHAPES = [(1, 1, 1), (3, 1, 131), (17, 131, 67), (33, 144, 160), (70, 64, 16)]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("k", "a", "b"), SHAPES)
def test_a_rectangle(triton_device: torch.device, k: int, a: int, b: int, precision: str) -> None:
    left, right = panel(k, a), panel(k, b)
    everywhere = torch.ones(a, b, dtype=torch.bool)
    for dtype in (torch.float32, torch.float16):
        start = torch.randn(a, b).to(dtype)
        tile = start.clone().to(triton_device)
        rank_update(tile, left.to(triton_device), right.to(triton_device), backend="triton", precision=precision)
        assert_sums(tile.cpu(), start, left, right, FACTOR[precision], everywhere)
    if precision in HALF:  # rows in the precision's own dtype: the same numbers
        again = start.clone().to(triton_device)
        rows = [x.to(triton_device, HALF[precision]) for x in (left, right)]
        rank_update(again, *rows, backend="triton", precision=precision)
        assert torch.equal(again, tile)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("k", "n"), [(1, 1), (5, 67), (17, 144), (9, 257)])
def test_a_triangle(triton_device: torch.device, k: int, n: int, precision: str) -> None:
    rows, start = panel(k, n), torch.randn(n, n)
    matrix = start.clone().to(triton_device)
    rank_update_triangle(matrix, rows.to(triton_device), backend="triton", precision=precision)
    upper = torch.ones(n, n, dtype=torch.bool).triu()
    assert_sums(matrix.cpu(), start, rows, rows, FACTOR[precision], upper)
    reference = start.clone()
    rank_update_triangle(reference, rows, backend="torch")
    assert_sums(reference, start, rows, rows, FACTOR["fp32"], upper)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_centering_and_scaling_at_the_load(triton_device: torch.device, precision: str) -> None:
    """Losses of mean 1e3 that vary by 1e-3: a float32 mean would be off by 3 % of that; this one is not."""
    k, n = 21, 131
    scale = 2.0 ** torch.randint(-12, -7, (n,))
    losses = (1000.0 + torch.rand(n) + scale * torch.randn(k, n)).float()
    mean, last, start = losses.double().mean(dim=0), torch.randn(n), torch.zeros(n, n)
    rows = torch.cat([(losses.double() - mean) / scale, last.double().unsqueeze(0)])
    options: dict[str, Any] = {"mean": mean, "inverse_scale": 1 / scale, "last": last}
    for backend in ("torch", "triton"):
        device = triton_device if backend == "triton" else torch.device("cpu")
        matrix = start.clone().to(device)
        on_device = {name: value.to(device) for name, value in options.items()}
        rank_update_triangle(matrix, losses.to(device), backend=backend, precision=precision, **on_device)
        upper = torch.ones(n, n, dtype=torch.bool).triu()
        # The last row is added in float32; bounding it like the others only widens the bound.
        assert_sums(matrix.cpu(), start, rows, rows, CUT[precision] if backend == "triton" else FACTOR["fp32"], upper)


def test_views_of_larger_arrays(triton_device: torch.device) -> None:
    """A tile inside a matrix, rows inside a panel, at odd offsets; nothing beside them is read or written."""
    k, a, b = 7, 70, 45
    whole = torch.full((100, 133), float("nan"), device=triton_device)
    rows = torch.full((k, 301), float("nan"), device=triton_device)
    left, right = panel(k, a), panel(k, b)
    rows[:, 3 : 3 + a], rows[:, 101 : 101 + b] = left.to(triton_device), right.to(triton_device)
    tile = whole[5 : 5 + a, 9 : 9 + b]
    tile.zero_()
    rank_update(tile, rows[:, 3 : 3 + a], rows[:, 101 : 101 + b], backend="triton")
    assert_sums(tile.cpu(), torch.zeros(a, b), left, right, FACTOR["fp32"], torch.ones(a, b, dtype=torch.bool))
    assert int(torch.isfinite(whole).sum()) == a * b


def test_several_panels_at_once_and_nan_shows(triton_device: torch.device) -> None:
    first, second = panel(9, 40).to(triton_device), panel(4, 40).to(triton_device)
    start = torch.zeros(40, 40)
    matrix = start.clone().to(triton_device)
    rank_update_triangle(matrix, torch.cat([first, second]), backend="triton")
    both = torch.cat([first, second]).cpu()
    assert_sums(matrix.cpu(), start, both, both, FACTOR["fp32"], torch.ones(40, 40, dtype=torch.bool).triu())
    second[2, 13] = float("nan")
    rank_update_triangle(matrix, second, backend="triton")
    assert sorted({i for pair in torch.isnan(matrix).nonzero().tolist() for i in pair if 13 in pair}) == [*range(40)]


def test_offsets_past_two_to_the_31(triton_device: torch.device, tmp_path: Path) -> None:
    """Rows 2^30 elements apart: row 3 begins past 2^31 elements of the matrix, as one does from N = 46,341 on.

    The storage is a sparse file: only the pages that are touched exist.
    """
    if triton_device.type != "cpu":
        pytest.skip("the file is mapped in host memory")
    stride, k = 2**30, 3

    def far_rows(name: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        storage = torch.from_file(str(tmp_path / name), shared=True, size=(rows - 1) * stride + 4096, dtype=dtype)
        return storage.as_strided((rows, columns), (stride, 1))

    tile, left, right = far_rows("tile", 5, 3, torch.float16), panel(k, 5), panel(k, 3)
    rank_update(tile, left, right, backend="triton")
    start = torch.zeros(5, 3, dtype=torch.float16)
    assert_sums(tile.clone(), start, left, right, FACTOR["fp32"], torch.ones(5, 3, dtype=torch.bool))

    rows, square = far_rows("rows", 4, 16, torch.float32), torch.zeros(16, 16)
    rows.copy_(panel(4, 16))
    rank_update(square, rows, rows, backend="triton")
    near = rows.clone()
    assert_sums(square, torch.zeros(16, 16), near, near, FACTOR["fp32"], torch.ones(16, 16, dtype=torch.bool))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "cpp"}, "backend must be one of torch, triton, got 'cpp'"),
        ({"precision": "fp8"}, "precision must be one of fp32, .* got 'fp8'"),
        ({"matrix": torch.zeros(4, 4).double()}, "tile must be .* float32 or float16"),
        ({"matrix": torch.zeros(8, 4)[::2].T}, "adjacent columns"),
        ({"panel": torch.zeros(3, 5)}, r"rows_i must be \[k, 4\]"),
        ({"panel": torch.zeros(3, 4).half()}, r"rows_i must be \[k, 4\] float32"),
        ({"mean": torch.zeros(4)}, "mean and inverse_scale must be given together"),
        ({"mean": torch.zeros(5), "inverse_scale": torch.ones(4)}, r"mean must be \[4\] on cpu, got \[5\]"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    good = {"matrix": torch.zeros(4, 4), "panel": torch.zeros(3, 4), "backend": "triton"}
    with pytest.raises(ValueError, match=message):
        rank_update_triangle(**(good | change))
