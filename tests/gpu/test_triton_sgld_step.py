"""The Triton step: the reference's words bit for bit, normals within 2 ulp, steps against float64, 64-bit offsets.

Small arrays: the interpreter takes about 25 microseconds per normal.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from lossk.kernels import normals as kernel
from lossk.kernels.launch import COMPILED_AS
from lossk.ops import philox
from lossk.ops.sgld_step import sgld_step, sgld_step_reference

EPS = 2.0**-24
NOISE = {"seed": 2**32 - 5, "chain": 2, "step": 31}
PHYSICS = {"lr": 1e-3, "n_beta": 40.0, "localization": 7.0}
SIZES = (1, 2, 3, 4, 5, 1021, 1024, 1025, 2053)


@triton.jit
def box_muller_kernel(x_ptr, y_ptr, first_ptr, second_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at).to(tl.uint32, bitcast=True)
    y = tl.load(y_ptr + at).to(tl.uint32, bitcast=True)
    first, second = kernel.box_muller(x, y)
    tl.store(first_ptr + at, first)
    tl.store(second_ptr + at, second)


def ulps_apart(a: Tensor, b: Tensor) -> int:
    """Largest distance in float32 steps; NaN is far from everything."""
    order = [np.where(x < 0, -(x.view(np.int32) & 0x7FFFFFFF), x.view(np.int32)).astype(np.int64) for x in (a, b)]
    assert bool(torch.isfinite(torch.from_numpy(np.stack([a, b]))).all())
    return int(np.abs(order[0] - order[1]).max())


def words(count: int, device: torch.device, first_block: int = 0, **stream: int) -> np.ndarray:
    out = torch.full((count,), -1, dtype=torch.int32, device=device)
    kernel.fill(out, **stream, first_block=first_block)
    return out.cpu().numpy().view(np.uint32)


@pytest.mark.parametrize("count", SIZES)
def test_words_are_the_reference_s(triton_device: torch.device, count: int) -> None:
    ones = 2**32 - 1
    for seed, chain, step, stream in ((0, 0, 0, 0), (1, 1, 1, 1), (ones, 5, ones, 1), (42, ones, 9, ones)):
        got = words(count, triton_device, seed=seed, chain=chain, step=step, stream=stream)
        assert np.array_equal(got, philox.uint32_stream(seed, chain, step, stream, count))


@pytest.mark.parametrize("first", [2**31 - 40, 2**32 - 40, 3 * 2**32 - 32, 2**61 - 64])
def test_words_across_the_block_carry(triton_device: torch.device, first: int) -> None:
    """Element 4 * first: offsets, and the counters made from them, are 64-bit."""
    got = words(4 * 64, triton_device, first, seed=1, chain=2, step=3, stream=0)
    blocks = np.arange(first, first + 64, dtype=np.uint64)
    counter = np.stack([blocks & 0xFFFFFFFF, blocks >> 32, np.full(64, 3), np.zeros(64)], axis=1).astype(np.uint32)
    assert np.array_equal(got, philox.philox4x32(counter, (1, 2)).reshape(-1))


@pytest.mark.parametrize("count", [*SIZES, 60_001])
def test_normals_within_two_ulp(triton_device: torch.device, count: int) -> None:
    out = torch.full((count,), float("nan"), device=triton_device)
    kernel.fill(out, 3, 1, 77)
    assert ulps_apart(out.cpu().numpy(), philox.normals(3, 1, 77, count).numpy()) <= 2


def test_normals_of_edge_words(triton_device: torch.device) -> None:
    """The ends of the range, the quadrants' edges, powers of two, and where the logarithm changes exponent."""
    centers = [0, 2**29, 2**30, 3 * 2**29, 2**31, 5 * 2**29, 3 * 2**30, 7 * 2**29, *(2**k for k in range(0, 32, 5))]
    centers += [int(0.5**0.5 * 2**k) for k in (8, 24, 31, 32)]
    values = sorted({(c + d) % 2**32 for c in centers for d in (-128, -1, 0, 1, 128)})
    pairs = np.array(list(itertools.product(values, values)), dtype=np.uint32)
    pairs = np.concatenate([pairs, pairs[: -len(pairs) % 1024]])
    expected = philox.box_muller(pairs)
    x, y = (torch.from_numpy(np.ascontiguousarray(pairs[:, i]).view(np.int32)).to(triton_device) for i in (0, 1))
    first, second = (torch.full(x.shape, float("nan"), device=triton_device) for _ in range(2))
    box_muller_kernel[(len(x) // 1024,)](x, y, first, second, BLOCK=1024, **COMPILED_AS)
    got = np.stack([first.cpu().numpy(), second.cpu().numpy()], axis=1)
    assert ulps_apart(got + 0.0, expected + 0.0) <= 2
    assert (got[pairs[:, 0] == 2**32 - 1] == 0).all()  # u = 1


def arrays(count: int, device: torch.device) -> list[Tensor]:
    """w, grad, anchor, square_avg, over several orders of magnitude."""
    rng = np.random.default_rng(count)
    w, grad, noise = rng.standard_normal((3, count)) * 10.0 ** rng.uniform(-6, 1, (3, count))
    square_avg = rng.standard_normal(count) ** 2 * 10.0 ** rng.uniform(-6, 2, count)
    grad[::7] = 0.0
    return [torch.from_numpy(x.astype(np.float32)).to(device) for x in (w, grad, w + 0.1 * noise, square_avg)]


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("variant", ["plain", "update", "keep"])
def test_step_matches_float64(triton_device: torch.device, count: int, variant: str) -> None:
    """At most 10 roundings act on any term of a plain step and 16 on one of RMSprop; the noise is within 2 ulp."""
    w, grad, anchor, v = arrays(count, triton_device)
    square_avg = None if variant == "plain" else v
    options: dict[str, Any] = {"alpha": 0.9, "stability": 0.05, "update_square_avg": variant == "update"}
    w64, g64, a64 = (x.cpu().double() for x in (w, grad, anchor))
    v64 = None if square_avg is None else square_avg.cpu().double()
    xi, start = philox.normals(**NOISE, count=count).double(), w64.clone()
    sgld_step_reference(w64, g64, a64, xi, **PHYSICS, square_avg=v64, **options)
    gain = torch.ones(()) if v64 is None else 1 / (v64.sqrt() + 0.05)
    drift = PHYSICS["n_beta"] * g64.abs() + PHYSICS["localization"] * (start.abs() + a64.abs())
    scale = start.abs() + PHYSICS["lr"] / 2 * gain * drift + (PHYSICS["lr"] * gain).sqrt() * xi.abs()

    sgld_step(w, grad, anchor, **PHYSICS, **NOISE, backend="triton", square_avg=square_avg, **options)
    assert ((w.cpu() - w64).abs() <= (10 if square_avg is None else 16) * EPS * scale).all()
    if square_avg is not None:
        assert v64 is not None
        assert ((square_avg.cpu() - v64).abs() <= 8 * EPS * v64).all()


def test_an_element_does_not_depend_on_the_size(triton_device: torch.device) -> None:
    w, grad, anchor, v = arrays(2053, triton_device)
    before, before_v = w.clone(), v.clone()
    sgld_step(w, grad, anchor, **PHYSICS, **NOISE, backend="triton", square_avg=v)
    for count in (1, 3, 1021, 1024, 1025):
        part, part_v = before[:count].clone(), before_v[:count].clone()
        sgld_step(part, grad[:count], anchor[:count], **PHYSICS, **NOISE, backend="triton", square_avg=part_v)
        assert torch.equal(part, w[:count])
        assert torch.equal(part_v, v[:count])


def test_nothing_outside_is_touched_and_nan_shows(triton_device: torch.device) -> None:
    padded = torch.full((2, 1021 + 64), float("nan"), device=triton_device)
    w, grad, anchor, v = arrays(1021, triton_device)
    padded[0, 32:-32], padded[1, 32:-32] = w, v
    grad[77] = float("nan")
    versions = w._version
    sgld_step(padded[0, 32:-32], grad, anchor, **PHYSICS, **NOISE, backend="triton", square_avg=padded[1, 32:-32])
    assert torch.isnan(padded).nonzero()[:, 1].unique().tolist() == [*range(32), 32 + 77, *range(1053, 1085)]
    sgld_step(w, grad, anchor, **PHYSICS, **NOISE, backend="triton")
    assert w._version > versions  # autograd sees the change
    assert torch.isnan(w).nonzero().tolist() == [[77]]


def test_no_elements(triton_device: torch.device) -> None:
    empty = torch.zeros(0, device=triton_device)
    sgld_step(empty, empty.clone(), empty.clone(), **PHYSICS, **NOISE, backend="triton")
