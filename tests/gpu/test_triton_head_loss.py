"""The head's loss, reference and Triton kernel: against float64, splits, several heads, views, special targets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lossk.kernels import head_loss as kernel
from lossk.ops.head_loss import PRECISIONS, head_loss

FACTOR = {"fp32": 2.0**-24, "tf32": 2.0**-11, "tf32x3": 2.0**-21, "fp16": 2.0**-24, "bf16": 2.0**-24}
KINDS = [(torch.float32, p) for p in PRECISIONS] + [(torch.float16, "fp32"), (torch.bfloat16, "fp32")]


@pytest.fixture(params=["torch", "cpp", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def problem(batch: int, num_classes: int, depth: int, heads: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every other row's hidden state points along its class's weights, so its loss is small."""
    head = torch.randn(heads, num_classes, depth)
    targets = torch.randint(0, num_classes, (batch,))
    hidden = torch.randn(batch, depth)
    hidden[::2] = 3.0 * head[0, targets[::2]] + 0.1 * hidden[::2]
    bias = torch.randn(heads, num_classes)
    return {"hidden": hidden.to(dtype), "head": head.to(dtype), "bias": bias.to(dtype), "targets": targets}


def float64_losses(hidden: Tensor, head: Tensor, bias: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(losses [k, B], size [k, B] of the largest logit's sum of absolute terms), float64."""
    wide = hidden.double() @ head.double().transpose(1, 2) + bias.double().unsqueeze(1)
    column = targets.expand(len(head), -1).unsqueeze(2)
    gaps = (wide - wide.gather(2, column)).scatter(2, column, float("-inf"))
    others = gaps.logsumexp(dim=2)
    size = hidden.double().abs() @ head.double().abs().transpose(1, 2) + bias.double().abs().unsqueeze(1)
    losses = torch.where(others < -30, others.exp(), torch.nn.functional.softplus(others, threshold=1000))
    return losses, size.amax(dim=2)


def run(data: dict[str, Tensor], device: torch.device, **options: Any) -> Tensor:
    shape = (*data["head"].shape[:-2], len(data["hidden"]))
    out = torch.full(shape, float("nan"), device=device)
    head_loss(**{name: x.to(device) for name, x in data.items()}, out=out, **options)
    return out.cpu()


@pytest.mark.parametrize(("dtype", "precision"), KINDS, ids=str)
@pytest.mark.parametrize(
    ("batch", "num_classes", "depth", "heads"),
    [(1, 1, 1, 1), (1, 2, 3, 2), (67, 3, 17, 1), (5, 131, 16, 3), (131, 257, 48, 2)],
)
def test_against_float64(
    triton_device: torch.device,
    backend: str,
    batch: int,
    num_classes: int,
    depth: int,
    heads: int,
    dtype: torch.dtype,
    precision: str,
) -> None:
    data = problem(batch, num_classes, depth, heads, dtype)
    expected, size = float64_losses(**data)
    device = triton_device if backend == "triton" else torch.device("cpu")
    got = run(data, device, backend=backend, precision=precision)
    # A logit is off by depth + 1 float32 roundings of its terms and two roundings per factor; a loss by twice that,
    # relative to itself where it is small; and by 1e-6 of itself from the sum of exponentials.
    factor = FACTOR[precision] if backend == "triton" else FACTOR["fp32"]
    logit = size * ((depth + 1) * 2.0**-24 + 2 * factor)
    assert ((got.double() - expected).abs() <= 1e-6 * expected + 2 * logit * expected.clamp(max=1) + 2.0**-149).all()


def test_small_losses_keep_their_digits(triton_device: torch.device) -> None:
    """Logits that are exact in float32: the losses are (C - 1) e^-margin to 1e-6, down to 1e-38."""
    margins = torch.arange(1.0, 87.0)
    head = torch.zeros(7, 16)
    head[3] = 1.0
    data = {"hidden": (margins / 16).unsqueeze(1).repeat(1, 16), "head": head, "targets": torch.full((86,), 3)}
    expected = torch.log1p(6 * (-margins.double()).exp())
    for dtype in (torch.float32, torch.bfloat16):
        got = run(data | {n: data[n].to(dtype) for n in ("hidden", "head")}, triton_device, backend="triton")
        assert ((got.double() - expected).abs() <= 1e-6 * expected).all()


@pytest.mark.parametrize("processors", [1, 2, 3, 100])
def test_any_split_of_the_classes(
    triton_device: torch.device, processors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The classes are split among as many programs as the device has room for; the losses hardly notice."""
    data = problem(9, 700, 32, 2, torch.float32)
    whole = run(data, triton_device, backend="triton")
    monkeypatch.setattr(kernel, "processors", lambda device: processors)
    torch.testing.assert_close(run(data, triton_device, backend="triton"), whole, rtol=1e-6, atol=0.0)


def test_several_heads_are_each_head_by_itself(triton_device: torch.device, backend: str) -> None:
    data = problem(67, 131, 32, 3, torch.float32)
    device = triton_device if backend == "triton" else torch.device("cpu")
    together = run(data, device, backend=backend)
    for h in range(3):
        alone = run(data | {"head": data["head"][h], "bias": data["bias"][h]}, device, backend=backend)
        torch.testing.assert_close(alone, together[h], rtol=1e-6, atol=0.0)
    data["bias"].zero_()
    plain = {name: x for name, x in data.items() if name != "bias"}
    assert torch.equal(run(plain, device, backend=backend), run(data, device, backend=backend))


def test_views_and_the_rows_of_a_panel(triton_device: torch.device) -> None:
    data = problem(13, 29, 16, 2, torch.float32)
    expected = run(data, triton_device, backend="triton")
    wide = {name: torch.full((*data[name].shape[:-1], 45), float("nan")) for name in ("hidden", "head")}
    for name, x in wide.items():
        x[..., 7:23] = data[name]
        wide[name] = x.to(triton_device)[..., 7:23]
    panel = torch.full((6, 40), float("nan"), device=triton_device)
    rest = {name: data[name].to(triton_device) for name in ("bias", "targets")}
    head_loss(**wide, **rest, out=panel[1:4:2, 10:23], backend="triton")
    torch.testing.assert_close(panel[1:4:2, 10:23].cpu(), expected, rtol=1e-6, atol=0.0)
    assert int(torch.isfinite(panel).sum()) == 26
    transposed = data | {"head": data["head"].transpose(1, 2).contiguous().transpose(1, 2)}
    assert torch.equal(run(transposed, triton_device, backend="triton"), expected)


def test_a_head_that_begins_anywhere_is_multiplied_as_an_aligned_one(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = problem(5, 7, 16, 1, torch.float32)
    expected, seen = run(data, triton_device, backend="triton"), []
    plain = kernel.configuration

    def watched(dtype: str, precision: str, aligned: bool) -> Any:
        seen.append(aligned)
        return plain(dtype, precision, aligned)

    monkeypatch.setattr(kernel, "configuration", watched)
    flat = torch.full((1 + 7 * 16,), float("nan"), device=triton_device)
    flat[1:] = data["head"].flatten().to(triton_device)
    view = flat[1:].view(1, 7, 16)
    assert view.data_ptr() % 16
    out = torch.zeros(1, 5, device=triton_device)
    rest = {name: data[name].to(triton_device) for name in ("hidden", "bias", "targets")}
    head_loss(head=view, out=out, backend="triton", **rest)
    assert seen == [True]
    assert torch.equal(out.cpu(), expected)


def test_special_targets_and_nan(triton_device: torch.device, backend: str) -> None:
    device = triton_device if backend == "triton" else torch.device("cpu")
    data = problem(6, 10, 8, 2, torch.float32)
    plain = run(data, device, backend=backend)
    data["targets"][1] = -100
    if backend == "triton":
        data["targets"][2], data["targets"][3] = -1, 10
    data["hidden"][4, 0] = float("nan")
    got = run(data, device, backend=backend)
    assert (got[:, 1] == 0).all()
    assert torch.isnan(got[:, 4]).all()
    assert torch.equal(got[:, [0, 5]], plain[:, [0, 5]])
    if backend == "triton":
        assert torch.isnan(got[:, 2:4]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "cuda"}, "backend must be one of torch, cpp, triton, got 'cuda'"),
        ({"precision": "fp16"}, "precision must be one of fp32, tf32, tf32x3, got 'fp16'"),
        ({"hidden": torch.zeros(3, 4).double()}, r"hidden must be \[B, d\] .* got \[3, 4\] float64"),
        ({"head": torch.zeros(5, 3)}, r"head must be \[C, 4\] or \[k, C, 4\] float32 on cpu, got \[5, 3\]"),
        ({"head": torch.zeros(5, 4).half()}, "head must be .* got .* float16"),
        ({"bias": torch.zeros(4)}, r"bias must be \[5\] float32 on cpu, got \[4\]"),
        ({"out": torch.zeros(2, 3)}, r"out must be \[3\] float32 on cpu, got \[2, 3\]"),
        ({"targets": torch.zeros(3)}, r"targets must be \[3\] int64"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    good = {"hidden": torch.zeros(3, 4), "head": torch.zeros(5, 4), "targets": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        head_loss(**({"backend": "triton", "out": torch.zeros(3)} | good | change))
