"""tile += rows_i' rows_j: the contribution of a panel's centered, scaled rows to the kernel, by tile or by triangle."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from lossk.operands import check_operands, check_word
from lossk.ops import triton_kernels
from lossk.ops.self_test_numbers import waves

BACKENDS = ("torch", "triton")
# Of the products; sums are float32 in all of them. "tf32x3" makes a float32 product of three tf32 ones.
PRECISIONS = ("fp32", "tf32", "tf32x3", "fp16", "bf16")
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


def rank_update(
    tile: Tensor, rows_i: Tensor, rows_j: Tensor, *, backend: str = "torch", precision: str = "fp32"
) -> None:
    """Add the product of two column blocks of a panel to a tile, in place.

    A plain matrix product is at the machine's GEMM peak on a CPU, so the reference is also the CPU's fast path.
    2 a b (k+1) flops; reads and writes the tile once.

    Args:
        tile: [a, b] float32 (for "triton" also float16), columns adjacent, changed in place.
        rows_i: [k+1, a] float32, centered and scaled losses of the tile's rows; of several panels, one below the other.
        rows_j: [k+1, b] float32, the same of its columns.
        backend: "torch" (the reference: float32 products whatever the precision asked for) or "triton".
        precision: one of PRECISIONS; for "fp16" and "bf16" rows may be given in these dtypes.

    Raises:
        ValueError: a bad argument; nothing has been changed.
        BackendError: "triton" cannot run here.
    """
    _check(tile, rows_i, rows_j, backend, precision)
    if backend == "torch":
        tile.addmm_(rows_i.T.to(tile.dtype), rows_j.to(tile.dtype))
        return
    _launch(tile, rows_i, rows_j, precision, triangle=False)


def rank_update_triangle(
    matrix: Tensor,
    panel: Tensor,
    *,
    backend: str,
    precision: str = "fp32",
    mean: Tensor | None = None,
    inverse_scale: Tensor | None = None,
    last: Tensor | None = None,
) -> None:
    """Add panel' panel to the entries on and above the diagonal of a symmetric matrix, in place, in one launch.

    For the whole kernel where it fits a device, and for its diagonal tiles: half the work of a square product. The
    entries below the diagonal are left as they are; whoever reads the matrix mirrors it once, at the end. N^2 (k+1)
    flops; reads and writes half the matrix once, so several panels are worth laying one below the other.

    Args:
        matrix: [N, N] float32 or float16, columns adjacent. float16 rounds at every update; for stored, final tiles.
        panel: [k, N] float32 (for "fp16" and "bf16" also these dtypes).
        backend: "torch" (the reference: float32 products whatever the precision asked for) or "triton".
        precision: one of PRECISIONS.
        mean, inverse_scale: [N] float64 and [N] float32, both or neither: of a float32 panel, take
            (panel - mean) * inverse_scale instead, formed at the load. The mean is used to 48 bits.
        last: [N] float32: one more row, as it is (the step of the mean of `lossk.accumulate.panel`); with mean only.

    Raises:
        ValueError: a bad argument; nothing has been changed.
        BackendError: "triton" cannot run here.
    """
    check_operands(matrix=matrix, panel=panel)
    _check(matrix, panel, panel, backend, precision, "matrix and panel: ")
    if (mean is None) != (inverse_scale is None) or (mean is None and last is not None):
        raise ValueError("mean and inverse_scale must be given together, and last only with them")
    if mean is not None and panel.dtype != torch.float32:
        raise ValueError(f"panel must be float32 to be centered at the load, got {panel.dtype}")
    scaling = None if mean is None else _scaling(panel, mean, inverse_scale, last)
    if backend == "torch":
        rank_update_triangle_reference(matrix, panel, scaling)
    else:
        _launch(matrix, panel, panel, precision, triangle=True, scaling=scaling)


def rank_update_triangle_reference(matrix: Tensor, panel: Tensor, scaling: Tensor | None) -> None:
    """The same in plain torch, for scaling [4, N] float32: mean (high and low part), 1/scale, last row."""
    rows = panel
    if scaling is not None:
        high, low, gain, last = scaling
        rows = torch.cat([((panel - high) - low) * gain, last.unsqueeze(0)])
    matrix += (rows.T.float() @ rows.float()).triu().to(matrix.dtype)


def _scaling(panel: Tensor, mean: Tensor, inverse_scale: Tensor | None, last: Tensor | None) -> Tensor:
    """[4, N] float32: the mean's high and low part, 1/scale, and the last row (zeros if there is none)."""
    assert inverse_scale is not None
    shape = panel.shape[1:]
    for name, value in (("mean", mean), ("inverse_scale", inverse_scale), ("last", last)):
        if value is not None:
            check_operands(**{name: value})
        if value is not None and (value.shape != shape or value.device != panel.device):
            raise ValueError(f"{name} must be {list(shape)} on {panel.device}, got {list(value.shape)}")
    high = mean.float()
    low = (mean.double() - high).float()
    return torch.stack([high, low, inverse_scale.float(), torch.zeros_like(high) if last is None else last.float()])


def _launch(
    out: Tensor, left: Tensor, right: Tensor, precision: str, *, triangle: bool, scaling: Tensor | None = None
) -> None:
    module = triton_kernels.load("rank_update", out.device)
    if scaling is None:
        dtype = HALF.get(precision, torch.float32)
        left, right = left.to(dtype), left.to(dtype) if triangle else right.to(dtype)
    if out.numel() and len(left):
        module.rank_update(out, left, right, triangle=triangle, precision=precision, scaling=scaling)


def _check(out: Tensor, left: Tensor, right: Tensor, backend: str, precision: str, of: str = "") -> None:
    check_word("backend", backend, BACKENDS)
    check_word("precision", precision, PRECISIONS)
    check_operands(tile=out, rows_i=left, rows_j=right)
    if out.ndim != 2 or out.stride(1) != 1 or out.dtype not in (torch.float32, torch.float16):
        raise ValueError(
            f"{of}tile must be [a, b] float32 or float16 with adjacent columns, got {list(out.shape)} {out.dtype}"
        )
    for name, rows, count in (("rows_i", left, out.shape[0]), ("rows_j", right, out.shape[1])):
        allowed = (torch.float32, HALF.get(precision, torch.float32))
        if rows.ndim != 2 or rows.shape[1] != count or rows.dtype not in allowed or rows.device != out.device:
            raise ValueError(
                f"{of}{name} must be [k, {count}] float32 (or the precision's dtype) on {out.device}, "
                f"got {list(rows.shape)} {rows.dtype} on {rows.device}, beside a tile {list(out.shape)}"
            )
    if len(left) != len(right):
        raise ValueError(f"rows_i and rows_j must have as many rows, got {len(left)} and {len(right)}")


def self_test(module: ModuleType, device: torch.device) -> str:
    """The Triton kernel on a rectangle and a triangle of several blocks, in every precision; returns what differs."""
    for precision, slack in (("fp32", 1e-5), ("tf32", 3e-3), ("tf32x3", 1e-5), ("fp16", 3e-3), ("bf16", 3e-2)):
        for side in (144, 131):
            panel = waves(17, side)
            scaling = torch.stack([0.5 * panel[0], 1e-9 * panel[1], 2.0 + panel[2], panel[3]])
            rows = panel.to(HALF.get(precision, torch.float32))
            out = torch.full((2, side, side), 0.25, device=device, dtype=torch.float32)
            left, right = rows.to(device), rows[:, : side - 16].to(device)
            module.rank_update(out[0, :, : side - 16], left, right, triangle=False, precision=precision, scaling=None)
            panel, scaling = panel.to(device), scaling.to(device)
            module.rank_update(out[1], panel, panel, triangle=True, precision=precision, scaling=scaling)
            expected = torch.full((2, side, side), 0.25, device=device, dtype=torch.float32)
            expected[0, :, : side - 16] += left.float().T @ right.float()
            rank_update_triangle_reference(expected[1], panel, scaling)
            if not bool(((out - expected).abs() <= slack * 17 * 4).all()):
                return f"{precision} products of {side} columns differ from the reference"
    return ""
