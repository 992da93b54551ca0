"""The Triton loss kernel against float64: shapes, dtypes, small and large losses, strides, ignored and bad targets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lossk.ops.sample_loss import DTYPES, sample_loss

# Fused sum and epilogue: 2^-23 for 2^f, 2^-24 each for a product, the block's sum (a tree) and the final rounding, and
# as much again for adding blocks. ex2.approx on a GPU adds 2^-22.5.
RELATIVE = 1e-6


def float64_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """log(1 + sum exp(x_c - x_target)), written without cancellation: [B] float64."""
    wide, column = logits.double().cpu(), targets.cpu().unsqueeze(1)
    gaps = (wide - wide.gather(1, column)).scatter(1, column, float("-inf"))
    others = gaps.logsumexp(dim=1)
    return torch.where(others < -30, others.exp(), torch.nn.functional.softplus(others, threshold=1000))


def problem(batch: int, num_classes: int, spread: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits whose targets win or lose by up to about 2 spread."""
    logits = torch.randn(batch, num_classes) * spread
    targets = torch.randint(0, num_classes, (batch,))
    logits[::2].scatter_(1, targets[::2].unsqueeze(1), 2 * spread)
    return logits.to(dtype), targets


def run(logits: Tensor, targets: Tensor, device: torch.device, ignore_index: int = -100) -> Tensor:
    out = torch.full((len(logits),), float("nan"), device=device)
    sample_loss(logits.to(device), targets.to(device), out, backend="triton", ignore_index=ignore_index)
    return out.cpu()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "num_classes"), [(1, 1), (1, 2), (67, 3), (3, 17), (9, 127), (2, 131), (3, 2053)])
def test_against_float64(triton_device: torch.device, batch: int, num_classes: int, dtype: torch.dtype) -> None:
    for spread in (0.01, 1.0, 30.0, 300.0):
        logits, targets = problem(batch, num_classes, spread, dtype)
        expected = float64_loss(logits, targets)
        error = (run(logits, targets, triton_device).double() - expected).abs()
        # Below 1e-38 float32 runs out of digits; 2^-149 is its smallest number.
        assert (error <= RELATIVE * expected + 2.0**-149).all()


def test_small_losses_keep_their_digits(triton_device: torch.device) -> None:
    """Margins of 1 to 87 nats: the losses are e^-margin times C - 1, down to 1e-38."""
    margins = torch.linspace(1.0, 87.0, 87)
    logits = torch.zeros(87, 11)
    logits[:, 4] = margins
    logits += 3000.5 * torch.linspace(-1, 1, 87).unsqueeze(1).round()  # far from zero, nothing may change
    targets = torch.full((87,), 4)
    expected = float64_loss(logits, targets)
    assert expected[-1] < 2e-37
    assert ((run(logits, targets, triton_device).double() - expected).abs() <= RELATIVE * expected).all()


def test_many_classes(triton_device: torch.device) -> None:
    """A vocabulary's worth of equal terms in 64 blocks, with a maximum that grows from block to block."""
    num_classes = 262_144
    logits = torch.linspace(-3.0, 2.0, num_classes).repeat(2, 1)
    logits[1, 7] = 40.0
    targets = torch.tensor([12, 7])
    expected = float64_loss(logits, targets)
    assert ((run(logits, targets, triton_device).double() - expected).abs() <= RELATIVE * expected).all()


def test_a_strided_row_of_a_panel(triton_device: torch.device) -> None:
    logits, targets = problem(13, 29, 3.0, torch.float32)
    panel = torch.full((5, 40), float("nan"), device=triton_device)
    sample_loss(logits.to(triton_device), targets.to(triton_device), panel[3, 10:23], backend="triton")
    columns = torch.full((13, 4), float("nan"), device=triton_device)
    wide = torch.full((13, 64), float("nan"))  # what lies beside the logits is never read as one
    wide[:, 5:34] = logits
    sample_loss(wide.to(triton_device)[:, 5:34], targets.to(triton_device), columns[:, 2], backend="triton")
    expected = run(logits, targets, triton_device)
    assert torch.equal(panel[3, 10:23].cpu(), expected)
    assert torch.equal(columns[:, 2].cpu(), expected)
    assert int(torch.isfinite(panel).sum()) == int(torch.isfinite(columns).sum()) == 13


def test_ignored_and_impossible_targets(triton_device: torch.device) -> None:
    logits, targets = problem(6, 10, 1.0, torch.float32)
    plain = run(logits, targets, triton_device)
    targets[1], targets[2], targets[3], targets[4] = -100, -1, 10, 2**40
    got = run(logits, targets, triton_device)
    assert got[1] == 0
    assert torch.isnan(got[2:5]).all()
    assert torch.equal(got[[0, 5]], plain[[0, 5]])
    assert run(logits, targets, triton_device, ignore_index=2**40)[4] == 0
    reference = torch.full((6,), float("nan"))
    sample_loss(logits, torch.tensor([0, -100, 1, 2, 3, 4]), reference, backend="torch")
    assert reference[1] == 0
    assert torch.isfinite(reference).all()


def test_special_values(triton_device: torch.device) -> None:
    """NaN anywhere gives NaN; a class of logit -inf does not count; a target of -inf has infinite loss."""
    inf, nan = float("inf"), float("nan")
    logits = torch.tensor([[0.0, nan, 1.0], [nan, 0.0, 1.0], [0.0, -inf, 1.0], [-inf, 0.0, 1.0], [0.0, -inf, -inf]])
    got = run(logits, torch.zeros(5, dtype=torch.int64), triton_device)
    assert torch.isnan(got[:2]).all()
    torch.testing.assert_close(got[2], torch.tensor(1.0).exp().log1p())
    assert got[3] == inf
    assert got[4] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "cuda"}, "backend must be one of torch, cpp, triton, got 'cuda'"),
        ({"logits": torch.zeros(3)}, r"logits must be \[B, C\]"),
        ({"logits": torch.zeros(3, 4, dtype=torch.float64)}, "float32, got .* float64"),
        ({"logits": torch.zeros(4, 3).T}, "adjacent columns"),
        ({"targets": torch.zeros(3)}, r"targets must be \[3\] int64 on cpu, got \[3\] float32"),
        ({"targets": torch.zeros(2, dtype=torch.int64)}, r"targets must be \[3\] int64 on cpu, got \[2\]"),
        ({"out": torch.zeros(3, 1)}, r"out must be \[3\] float32 on cpu, got \[3, 1\]"),
        ({"out": torch.zeros(3, dtype=torch.float16)}, "out must be .* float16"),
    ],
)
def test_bad_arguments(change: dict[str, object], message: str) -> None:
    good = {"logits": torch.zeros(3, 4), "targets": torch.zeros(3, dtype=torch.int64), "out": torch.zeros(3)}
    with pytest.raises(ValueError, match=message):
        sample_loss(**({"backend": "triton"} | good | change))  # type: ignore[arg-type]
