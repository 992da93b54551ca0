"""`cross_entropy` against float64: within 1e-6 relative from 1e-30 to 100, far below where log-sum-exp ends."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import oracles
from lossk.ops import extension
from lossk.ops.sample_loss import cross_entropy, cross_entropy_slopes

LOSSES = [1e-30, 1e-25, 1e-20, 1e-15, 1e-10, 3e-8, 1e-6, 1e-4, 1e-2, 0.3, 0.69, 1.0, 3.0, 10.0, 30.0, 100.0]
RELATIVE = 1e-6


def logits_of_loss(loss: float, classes: int, batch: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random logits whose target logit is placed so that the loss is about `loss`. [B, C] float32, [B] int64."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((batch, classes))
    targets = rng.integers(0, classes, batch)
    rows = np.arange(batch)
    x[rows, targets] = -np.inf
    others = np.log(np.exp(x).sum(axis=1))
    x[rows, targets] = others - np.log(np.expm1(loss))
    return torch.from_numpy(x.astype(np.float32)), torch.from_numpy(targets)


def assert_exact(logits: Tensor, targets: Tensor, relative: float = RELATIVE) -> None:
    """Against float64 from the very same logits: what their own rounding did to the loss is not the op's error."""
    losses = cross_entropy(logits, targets)
    assert losses.dtype == torch.float32
    assert losses.shape == targets.shape
    exact = oracles.cross_entropy(logits.detach().double().numpy(), targets.numpy())
    error = np.abs(losses.detach().double().numpy() - exact) / exact
    assert np.all(error <= relative), f"relative error {np.max(error):.3g} at loss {exact[np.argmax(error)]:.3g}"


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("classes", [2, 3, 10, 1000])
def test_relative_error(loss: float, classes: int) -> None:
    logits, targets = logits_of_loss(loss, classes, 257, seed=classes)
    assert_exact(logits, targets)


@pytest.mark.parametrize("loss", [1e-30, 1e-8, 0.5, 50.0])
@pytest.mark.parametrize("offset", [80.0, -80.0, 1000.0])
def test_common_offset(loss: float, offset: float) -> None:
    """Adding 80 rounds the logits to multiples of 2^-17 (of 2^-14 at 1000): another loss, by up to 1e-5 relative, but
    the op must find the loss of the rounded logits as exactly as any other."""
    logits, targets = logits_of_loss(loss, 10, 101, seed=1)
    assert_exact(logits + offset, targets)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", [1e-30, 1e-8, 1e-3, 0.5, 50.0])
def test_half_precision_logits(dtype: torch.dtype, loss: float) -> None:
    """Half-precision logits are exact float32 numbers: the loss is computed, and returned, in float32."""
    logits, targets = logits_of_loss(loss, 10, 101, seed=2)
    assert_exact(logits.to(dtype), targets)


def test_one_sample_and_both_of_two_classes() -> None:
    for loss in LOSSES:
        logits, targets = logits_of_loss(loss, 2, 1, seed=3)
        assert_exact(logits, targets)
        assert_exact(logits.flip(1), 1 - targets)


def test_every_class_as_target() -> None:
    row = torch.linspace(-40, 25, 131)
    assert_exact(row.expand(131, 131), torch.arange(131))


def test_equal_logits() -> None:
    for classes in (2, 3, 1000):
        assert_exact(torch.full((4, classes), 7.0), torch.zeros(4, dtype=torch.int64))


def test_ties_at_the_top() -> None:
    logits = torch.tensor([[5.0, 5.0, -1.0], [5.0, 5.0, 5.0], [5.0, 5.0000005, -80.0]])
    for target in range(2):
        assert_exact(logits, torch.full((3,), target))


def test_a_loss_below_float32_is_zero_not_nan() -> None:
    losses = cross_entropy(torch.tensor([[300.0, -300.0], [1e30, -1e30]]), torch.tensor([0, 0]))
    np.testing.assert_array_equal(losses.numpy(), 0)
    losses = cross_entropy(torch.tensor([[300.0, -300.0], [1e30, -1e30]]), torch.tensor([1, 1]))
    np.testing.assert_allclose(losses.numpy(), [600, 2e30], rtol=RELATIVE)


def test_strided_logits() -> None:
    logits, targets = logits_of_loss(1e-9, 10, 64, seed=4)
    wide = torch.full((64, 20), float("nan"))
    wide[:, ::2] = logits
    np.testing.assert_array_equal(cross_entropy(wide[:, ::2], targets), cross_entropy(logits, targets))


def test_float64_logits_keep_small_losses() -> None:
    logits, targets = logits_of_loss(1e-12, 10, 64, seed=5)
    assert_exact(logits.double(), targets)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("classes", [2, 10])
def test_gradient(loss: float, classes: int) -> None:
    """softmax - onehot: finite everywhere and right relative to the largest entry, however small the loss."""
    logits, targets = logits_of_loss(loss, classes, 33, seed=6)
    logits.requires_grad_(True)
    cross_entropy(logits, targets).sum().backward()
    assert logits.grad is not None
    x = logits.detach().double().numpy()
    rows = np.arange(33)
    p = np.exp(x - x.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    exact = p.copy()
    exact[rows, targets] = 0
    exact[rows, targets] = -exact.sum(axis=1)  # p_t - 1 without the cancellation
    error = np.abs(logits.grad.double().numpy() - exact).max(axis=1) / np.abs(exact).max(axis=1)
    assert np.all(error <= 1e-5), f"relative error {np.max(error):.3g}"


def test_gradient_at_the_extremes_is_finite() -> None:
    rows = [[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [0.0, 0.0, 0.0], [90.0, 90.0, -90.0]]
    logits = torch.tensor(rows, requires_grad=True)
    cross_entropy(logits, torch.zeros(4, dtype=torch.int64)).sum().backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    np.testing.assert_allclose(logits.grad[1], [-1, 1, 0], atol=1e-7)
    np.testing.assert_allclose(logits.grad[2], [-2 / 3, 1 / 3, 1 / 3], rtol=1e-6)


# --- compiled ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("simd", ["auto", "avx2", "baseline"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (7, 3), (31, 10), (5, 2047), (3, 4096), (3, 4097), (2, 9001)])
def test_the_compiled_loss_is_the_reference_one(shape: tuple[int, int], simd: str) -> None:
    """Every row within 1e-6 of float64, like the reference, and the same bits whatever the instruction set."""
    module = extension.load()
    if not module.simd(simd):
        pytest.skip(f"no {simd} here")
    rows, classes = shape
    logits, targets = 9 * torch.randn(rows, classes), torch.randint(0, classes, (rows,))
    logits[::2].scatter_(1, targets[::2].unsqueeze(1), 60.0)  # well classified: tiny losses
    wide = torch.full((rows, classes + 3), float("nan"))
    wide[:, :classes] = logits
    out = torch.empty(rows)
    module.sample_loss(
        logits=wide.data_ptr(), targets=targets.data_ptr(), out=out.data_ptr(), rows=rows, classes=classes,
        stride=classes + 3, simd=simd,
    )  # fmt: skip
    exact = oracles.cross_entropy(logits.double().numpy(), targets.numpy())
    assert np.all(np.abs(out.numpy() - exact) <= RELATIVE * exact + 1e-38)
    assert torch.equal(out, cross_entropy(logits, targets, backend="cpp"))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_compiled_loss_is_exact_over_all_scales(loss: float, dtype: torch.dtype) -> None:
    logits, targets = logits_of_loss(loss, 10, 101, seed=7)
    logits = logits.to(dtype)
    exact = oracles.cross_entropy(logits.double().numpy(), targets.numpy())
    found = cross_entropy(logits, targets, backend="cpp").double().numpy()
    assert np.all(np.abs(found - exact) <= RELATIVE * exact + 1e-38)


def test_the_compiled_loss_of_many_threads_is_that_of_one() -> None:
    logits, targets = torch.randn(3001, 211), torch.randint(0, 211, (3001,))
    one = cross_entropy(logits, targets, backend="cpp")
    torch.set_num_threads(3)
    try:
        assert torch.equal(cross_entropy(logits, targets, backend="cpp"), one)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("classes", [5, 3000])
def test_ignored_targets_have_no_loss(backend: str, classes: int) -> None:
    logits, targets = torch.randn(4, classes), torch.tensor([1, -100, 0, -100])
    losses = cross_entropy(logits, targets, backend=backend)
    assert losses[[1, 3]].tolist() == [0, 0]
    assert torch.equal(losses[[0, 2]], cross_entropy(logits[[0, 2]], targets[[0, 2]], backend=backend))


@pytest.mark.parametrize("target", [-1, 4, -101, 2**40])
def test_the_compiled_loss_refuses_targets_out_of_range(target: int) -> None:
    with pytest.raises(ValueError, match=rf"targets must lie in \[0, 4\), row 1 has {target}"):
        cross_entropy(torch.zeros(2, 4), torch.tensor([0, target]), backend="cpp")


def test_no_rows() -> None:
    assert cross_entropy(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), backend="cpp").shape == (0,)


@pytest.mark.parametrize("row", [[0.0, -np.inf, -np.inf], [3.0, -np.inf, 1.0], [0.0, 3e38, -3e38], [3e38, 3e38, -3e38]])
def test_the_compiled_loss_at_the_extremes_is_the_reference_one(row: list[float]) -> None:
    logits, targets = torch.tensor([row]), torch.tensor([0])
    expected = cross_entropy(logits, targets)
    torch.testing.assert_close(cross_entropy(logits, targets, backend="cpp"), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("classes", [3, 40, 5000])
def test_the_compiled_loss_of_nan_is_nan(at: int, classes: int) -> None:
    logits = torch.zeros(1, classes)
    logits[0, at] = float("nan")
    assert torch.isnan(cross_entropy(logits, torch.tensor([1]), backend="cpp")).all()


# --- slopes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("classes", [2, 10, 4097])
@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_slopes_are_softmax_minus_onehot(loss: float, classes: int, backend: str) -> None:
    """Right relative to the largest entry of the row, however small the loss; a row of float64 truth."""
    logits, targets = logits_of_loss(loss, classes, 13, seed=8)
    losses, slopes = cross_entropy_slopes(logits, targets, 0.25, backend=backend)
    x, rows = logits.double().numpy(), np.arange(13)
    exact = np.exp(x - x.max(axis=1, keepdims=True))
    exact /= exact.sum(axis=1, keepdims=True)
    exact[rows, targets] = 0
    exact[rows, targets] = -exact.sum(axis=1)  # p_t - 1 without the cancellation
    assert torch.equal(losses, cross_entropy(logits, targets, backend=backend))
    error = np.abs(4 * slopes.double().numpy() - exact).max(axis=1) / np.abs(exact).max(axis=1)
    assert np.all(error <= 1e-5 if backend == "torch" else error <= RELATIVE), f"relative error {error.max():.3g}"


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("classes", [1, 5, 5000])
def test_slopes_of_ignored_targets_and_of_one_class_are_zero(backend: str, classes: int) -> None:
    logits, targets = torch.randn(3, 2 * classes)[:, ::2], torch.tensor([-100, 0, -100])
    losses, slopes = cross_entropy_slopes(logits, targets, 1.0, backend=backend)
    assert slopes.shape == logits.shape
    assert slopes[[0, 2]].abs().sum() == 0
    assert (slopes[1].abs().sum() == 0) == (classes == 1)
    assert torch.equal(losses, cross_entropy(logits, targets, backend=backend))
