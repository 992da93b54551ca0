"""One small problem per Triton kernel, compared with the reference: a function per op, named as the op.

Each returns what differs, or "". Written so that NaN and zeros fail.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lossk.ops import philox
from lossk.ops.head_loss import head_loss_reference
from lossk.ops.rank_update import HALF, rank_update_triangle_reference
from lossk.ops.sample_loss import cross_entropy
from lossk.ops.sgld_step import sgld_step_reference
from lossk.ops.top_correlations import EMPTY, merge_tile_reference


def head_loss(module: ModuleType, device: torch.device) -> str:
    """Two heads with a bias over several blocks of classes, in every precision, ragged and not."""
    targets = (torch.arange(9, device="cpu") * 7919) % 131
    for precision, slack in (("fp32", 1e-5), ("tf32", 1e-2), ("tf32x3", 1e-5), ("fp16", 2e-3), ("bf16", 2e-2)):
        for depth in (17, 32):
            dtype = HALF.get(precision, torch.float32)
            hidden, heads, bias = (_waves(*shape).to(dtype) for shape in ((9, depth), (2, 131, depth), (2, 131)))
            out = torch.full((2, 9), float("nan"), device=device, dtype=torch.float32)
            expected = torch.zeros(2, 9, dtype=torch.float32, device="cpu")
            on_device = [x.to(device) for x in (hidden, heads, bias, targets)]
            module.head_loss(*on_device, out, precision, -100)
            head_loss_reference(hidden, heads, bias, targets, expected, -100)
            if not _close(out, expected, slack):
                return f"{precision} losses of hidden states of size {depth} differ from the reference"
    return ""


def rank_update(module: ModuleType, device: torch.device) -> str:
    """A rectangle of several blocks and a triangle centred at the load, in every precision, ragged and not."""
    for precision, slack in (("fp32", 1e-5), ("tf32", 3e-3), ("tf32x3", 1e-5), ("fp16", 3e-3), ("bf16", 3e-2)):
        for side in (144, 131):
            panel = _waves(17, side)
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


def sample_loss(module: ModuleType, device: torch.device) -> str:
    """Losses from 1e-35 to 100 over one and over several blocks of columns."""
    for num_classes in (5, 4099):
        logits, targets = _classification(6, num_classes)
        out = torch.full((6,), float("nan"), device=device, dtype=torch.float32)
        module.sample_loss(logits.to(device), targets.to(device), out, -100)
        if not _close(out, cross_entropy(logits, targets), 1e-6):
            return f"losses of {num_classes} classes differ from the reference"
    return ""


def sgld_step(module: ModuleType, device: torch.device) -> str:
    """A plain and an RMSprop step of some ragged thousands of elements, with the reference's noise."""
    count = 2051
    key: dict[str, Any] = {"seed": 0xDEADBEEF, "chain": 3, "step": 7}
    physics: dict[str, Any] = {"lr": 0.01, "n_beta": 30.0, "localization": 2.0, "alpha": 0.9, "stability": 0.1}
    w, grad, anchor, square = _waves(4, count)
    xi = philox.normals(key["seed"], key["chain"], key["step"], count).double()
    for square_avg in (None, square.square()):
        v = None if square_avg is None else square_avg.double()
        expected = w.double()
        sgld_step_reference(expected, grad.double(), anchor.double(), xi, square_avg=v, **physics)
        got = w.clone().to(device)
        got_v = None if square_avg is None else square_avg.clone().to(device)
        module.sgld_step(got, grad.to(device), anchor.to(device), got_v, **physics, **key, update_square_avg=True)
        same_v = v is None or got_v is None or bool(((got_v.cpu() - v).abs() <= 1e-6).all())
        if not (same_v and bool(((got.cpu() - expected).abs() <= 2e-6).all())):
            return f"a {'plain' if v is None else 'RMSprop'} step differs from the reference"
    return ""


def top_correlations(module: ModuleType, device: torch.device) -> str:
    """Two tiles with dead samples and ties, one transposed, for few and for many neighbours: bit for bit."""
    first, second = _waves(11, 131), _waves(131, 11).mul(8).round().div(8)
    row_gain, column_gain = 1.0 + _waves(11).abs(), 1.0 + _waves(131).abs()
    row_gain[3], column_gain[77] = 0.0, 0.0
    for k in (5, 33):
        expected = torch.full((11, k), EMPTY, dtype=torch.int64, device="cpu")
        got = expected.clone().to(device)
        on_device = row_gain.to(device), column_gain.to(device)
        for tile, first_column in ((first, 0), (second.T, 131)):
            expected = merge_tile_reference(expected, tile, row_gain, column_gain, 0, first_column)
            module.top_correlations(got, tile.to(device), *on_device, 0, first_column)
        if not torch.equal(got.cpu(), expected):
            return f"the {k} nearest of two tiles differ from the reference"
    return ""


def _classification(batch: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """Logits [B, C] whose targets win by up to 80 or lose by up to 100, and the targets [B]."""
    logits = _waves(batch, num_classes)
    rows = torch.arange(batch, device="cpu")
    targets = (rows * 7919) % num_classes
    logits[rows, targets] = torch.linspace(-100.0, 80.0, batch, dtype=torch.float32, device="cpu")
    return logits, targets


def _waves(*shape: int) -> Tensor:
    """Numbers in [-1, 1] without pattern, and without a random generator."""
    count = math.prod(shape)
    return (torch.arange(count, dtype=torch.float64, device="cpu") ** 1.5).sin().float().reshape(shape)


def _close(got: Tensor, expected: Tensor, relative: float) -> bool:
    expected = expected.double()
    return bool(((got.cpu().double() - expected).abs() <= relative * expected.abs()).all())
