"""The SGLD step: each backend against float64, prefixes, thread counts, RMSprop, bad arguments."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lossk.errors import BackendError
from lossk.ops import extension, philox
from lossk.ops import sgld_step as op
from lossk.ops.sgld_step import sgld_step, sgld_step_reference

SIZES = (1, 2, 3, 4, 5, 7, 63, 64, 65, 1021, 200_003)
EPS = 2.0**-24  # half a float32 unit in the last place of 1
LEVELS = ("avx512", "avx2", "baseline")
NOISE = {"seed": 5, "chain": 2, "step": 31}
PHYSICS = {"lr": 1e-3, "n_beta": 40.0, "localization": 7.0}

needs_cpp = pytest.mark.skipif(not extension.status().available, reason=extension.status().reason or "available")


def test_the_extension_is_built_and_passes_its_self_test() -> None:
    """The tests below are skipped without it; this one is not."""
    assert extension.status().available, extension.status().reason


@pytest.fixture(params=["torch", pytest.param("cpp", marks=needs_cpp)])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def arrays(count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """w, grad, anchor, square_avg; with entries over several orders of magnitude, zeros and denormals."""
    rng = np.random.default_rng(seed)
    w, grad, noise = rng.standard_normal((3, count)) * 10.0 ** rng.uniform(-6, 1, (3, count))
    anchor = w + 0.1 * noise
    square_avg = rng.standard_normal(count) ** 2 * 10.0 ** rng.uniform(-6, 2, count)
    for i, value in enumerate((0.0, -0.0, 1e-40, 3e38)):
        grad[i::97] = value if value < 1 else grad[i::97]
        square_avg[i::89] = abs(value) if value < 1 else square_avg[i::89]
    w[5::83] = -1e-41
    return tuple(torch.from_numpy(x.astype(np.float32)) for x in (w, grad, anchor, square_avg))  # type: ignore[return-value]


def float64_step(
    w: Tensor, grad: Tensor, anchor: Tensor, square_avg: Tensor | None = None, update: bool = True, **options: Any
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(w, square_avg, sum of the absolute terms) in float64, from the same float32 noise."""
    xi = philox.normals(**NOISE, count=w.numel()).double()
    w64, g64, a64 = w.double(), grad.double(), anchor.double()
    v64 = None if square_avg is None else square_avg.double()
    sgld_step_reference(w64, g64, a64, xi, **PHYSICS, square_avg=v64, update_square_avg=update, **options)
    gain = torch.ones_like(w64) if v64 is None else 1 / (v64.sqrt() + options.get("stability", 0.1))
    lr = PHYSICS["lr"]
    drift = PHYSICS["n_beta"] * g64.abs() + PHYSICS["localization"] * (w.double().abs() + a64.abs())
    return w64, v64, w.double().abs() + lr / 2 * gain * drift + (lr * gain).sqrt() * xi.abs()


@pytest.mark.parametrize("count", SIZES)
def test_plain_step_matches_float64(backend: str, count: int) -> None:
    w, grad, anchor, _ = arrays(count)
    expected, _, scale = float64_step(w, grad, anchor)
    sgld_step(w, grad, anchor, **PHYSICS, **NOISE, backend=backend)
    # At most six roundings act on any term, and the noise is within 2 ulp: 10 half-units of the terms' sizes.
    assert ((w.double() - expected).abs() <= 10 * EPS * scale + 1e-44).all()


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("update", [True, False])
def test_rmsprop_step_matches_float64(backend: str, count: int, update: bool) -> None:
    w, grad, anchor, square_avg = arrays(count)
    options = {"alpha": 0.9, "stability": 0.05}
    expected, expected_v, scale = float64_step(w, grad, anchor, square_avg, update, **options)
    assert expected_v is not None
    before = square_avg.clone()
    sgld_step(
        w, grad, anchor, **PHYSICS, **NOISE, backend=backend, square_avg=square_avg, update_square_avg=update, **options
    )
    assert ((w.double() - expected).abs() <= 16 * EPS * scale + 1e-44).all()
    if update:
        assert ((square_avg.double() - expected_v).abs() <= 8 * EPS * expected_v + 1e-44).all()
    else:
        assert torch.equal(square_avg, before)


@needs_cpp
@pytest.mark.parametrize("simd", LEVELS)
@pytest.mark.parametrize("variant", ["plain", "update", "use"])
def test_every_simd_level_and_thread_count(simd: str, variant: str) -> None:
    module = extension.load()
    if module.simd(simd) != simd:
        pytest.skip(f"this CPU has no {simd}")
    results = []
    for num_threads in (1, 2, 3, 7):
        w, grad, anchor, square_avg = arrays(200_003)
        plain = variant == "plain"
        expected, _, scale = float64_step(w, grad, anchor, None if plain else square_avg, variant == "update")
        module.sgld_step(
            w=w.data_ptr(),
            grad=grad.data_ptr(),
            anchor=anchor.data_ptr(),
            square_avg=0 if plain else square_avg.data_ptr(),
            count=w.numel(),
            alpha=0.99,
            stability=0.1,
            update_square_avg=variant == "update",
            num_threads=num_threads,
            simd=simd,
            **PHYSICS,
            **NOISE,
        )
        assert ((w.double() - expected).abs() <= 16 * EPS * scale + 1e-44).all()
        results.append(w.numpy().tobytes() + square_avg.numpy().tobytes())
    assert len(set(results)) == 1


def test_an_element_does_not_depend_on_the_size(backend: str, threads: Callable[[int], None]) -> None:
    threads(3)
    w, grad, anchor, square_avg = arrays(200_003)
    before, before_v = w.clone(), square_avg.clone()
    sgld_step(w, grad, anchor, **PHYSICS, **NOISE, backend=backend, square_avg=square_avg)
    for count in SIZES[:-1]:
        part, part_v = before[:count].clone(), before_v[:count].clone()
        sgld_step(part, grad[:count], anchor[:count], **PHYSICS, **NOISE, backend=backend, square_avg=part_v)
        assert torch.equal(part, w[:count])
        assert torch.equal(part_v, square_avg[:count])


def test_resuming_gives_the_same_chain(backend: str) -> None:
    def run(w: Tensor, first: int, last: int) -> Tensor:
        w, (_, _, anchor, _) = w.clone(), arrays(1021)
        for step in range(first, last):
            sgld_step(w, 0.5 * w, anchor, **PHYSICS, seed=1, chain=0, step=step, backend=backend)
        return w

    start = arrays(1021)[0]
    assert torch.equal(run(start, 0, 10), run(run(start, 0, 4), 4, 10))
    assert not torch.equal(run(start, 0, 4), run(start, 1, 5))


@needs_cpp
def test_unaligned_views() -> None:
    for offset in range(1, 5):
        w, grad, anchor, _ = (x[offset:] for x in arrays(1021))
        expected = w.clone()
        sgld_step(expected, grad.clone(), anchor.clone(), **PHYSICS, **NOISE, backend="cpp")
        sgld_step(w, grad, anchor, **PHYSICS, **NOISE, backend="cpp")
        assert torch.equal(w, expected)


@pytest.mark.parametrize("rmsprop", [False, True])
def test_nothing_outside_the_arrays_is_touched(backend: str, rmsprop: bool) -> None:
    padded = torch.full((3, 1021 + 64), float("nan"))
    w, grad, anchor, square_avg = arrays(1021)
    for row, values in zip(padded, (w, anchor, square_avg), strict=True):
        row[32:-32] = values
    view_w, view_anchor, view_v = (row[32:-32] for row in padded)
    sgld_step(view_w, grad, view_anchor, **PHYSICS, **NOISE, backend=backend, square_avg=view_v if rmsprop else None)
    assert torch.isnan(padded[:, :32]).all()
    assert torch.isnan(padded[:, -32:]).all()
    assert torch.isfinite(padded[:, 32:-32]).all()
    assert torch.equal(view_anchor, anchor)


def test_nan_gradients_reach_the_weights(backend: str) -> None:
    w, grad, anchor, _ = arrays(130)
    grad[77] = float("nan")
    sgld_step(w, grad, anchor, **PHYSICS, **NOISE, backend=backend)
    assert torch.isnan(w).nonzero().tolist() == [[77]]


def test_autograd_sees_the_change(backend: str) -> None:
    w, grad, anchor, square_avg = arrays(10)
    versions = w._version, square_avg._version
    sgld_step(w, grad, anchor, **PHYSICS, **NOISE, backend=backend, square_avg=square_avg)
    assert w._version > versions[0]
    assert square_avg._version > versions[1]
    with torch.inference_mode():
        inside = torch.ones(10)
        sgld_step(inside, grad, anchor, **PHYSICS, **NOISE, backend=backend)
    assert torch.isfinite(inside).all()


def test_samples_a_gaussian(backend: str) -> None:
    """SGLD on n_beta w^2/2 + localization w^2/2 has stationary variance 1 / (a (1 - lr a / 4)), a the sum of both."""
    count, physics = 4096, {"lr": 0.02, "n_beta": 30.0, "localization": 20.0}
    w, anchor = torch.zeros(count), torch.zeros(count)
    total, steps = 0.0, 100
    for step in range(20 + steps):
        sgld_step(w, w.clone(), anchor, **physics, seed=3, chain=1, step=step, backend=backend)
        total += float((w.double() ** 2).mean()) if step >= 20 else 0.0
    a = 50.0
    rho2 = (1 - 0.02 * a / 2) ** 4  # lag-1 autocorrelation of w^2
    variance = 1 / (a * (1 - 0.02 * a / 4))
    error = variance * (2 / (count * steps) * (1 + rho2) / (1 - rho2)) ** 0.5
    assert abs(total / steps - variance) < 4.5 * error


def good() -> dict[str, Any]:
    w, grad, anchor, _ = arrays(8)
    return {"w": w, "grad": grad, "anchor": anchor, **PHYSICS, **NOISE, "backend": "torch"}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("w", torch.zeros(8, dtype=torch.float64), "w must be float32"),
        ("grad", torch.zeros(2, 4), "grad must be flat and contiguous"),
        ("anchor", torch.zeros(16)[::2], "anchor must be flat and contiguous"),
        ("grad", torch.zeros(9), "grad must have the 8 elements of w, got 9"),
        ("square_avg", torch.zeros(7), "square_avg must have the 8 elements of w, got 7"),
        ("lr", 0.0, "lr must be finite and > 0, got 0.0"),
        ("lr", float("nan"), "lr must be finite and > 0, got nan"),
        ("n_beta", -1.0, "n_beta must be finite and >= 0, got -1.0"),
        ("localization", float("inf"), "localization must be finite and >= 0, got inf"),
        ("stability", 0.0, "stability must be finite and > 0, got 0.0"),
        ("alpha", 1.0, r"alpha must be in \[0, 1\), got 1.0"),
        ("alpha", float("nan"), r"alpha must be in \[0, 1\), got nan"),
        ("seed", -1, r"seed must be in \[0, 2\^32\), got -1"),
        ("step", 2**32, r"step must be in \[0, 2\^32\), got 4294967296"),
        ("backend", "fortran", "backend must be one of torch, cpp, triton, got 'fortran'"),
    ],
)
def test_bad_values(name: str, value: Any, message: str) -> None:
    arguments = good() | {name: value}
    before = arguments["w"].clone()
    with pytest.raises(ValueError, match=message):
        sgld_step(**arguments)
    assert torch.equal(arguments["w"], before)


@pytest.mark.parametrize(("name", "value"), [("w", [1.0]), ("grad", None), ("chain", 1.0), ("seed", True)])
def test_bad_types(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{name} must be"):
        sgld_step(**(good() | {name: value}))


@needs_cpp
def test_bindings_refuse_bad_pointers_and_sizes() -> None:
    module = extension.load()
    w = torch.zeros(8)
    arguments = {name: w.data_ptr() for name in ("w", "grad", "anchor")}
    arguments |= {"square_avg": 0, "count": 8, **PHYSICS, "alpha": 0.9, "stability": 0.1, "update_square_avg": True}
    arguments |= NOISE
    for change in ({"w": 0}, {"grad": 0}, {"anchor": 0}, {"count": -1}, {"num_threads": 0}, {"simd": "mmx"}):
        with pytest.raises(ValueError, match="must"):
            module.sgld_step(**(arguments | change))
    assert not w.any()


def test_missing_extension_is_an_error_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = extension.ExtensionStatus(False, "lossk._C does not import (no such file)", "")
    monkeypatch.setattr(extension, "_load", lambda: (missing, None))
    assert not extension.status().available
    with pytest.raises(BackendError, match=r'no such file.*available: "torch"'):
        op.sgld_step(**(good() | {"backend": "cpp"}))


@needs_cpp
def test_self_test_notices_a_wrong_build() -> None:
    module = extension.load()

    class Wrong:
        philox_fill = staticmethod(module.philox_fill)
        sgld_step = staticmethod(module.sgld_step)

        @staticmethod
        def normals(**arguments: Any) -> None:
            module.normals(**(arguments | {"step": arguments["step"] + 1}))

    assert extension.self_test(module) == ""
    assert extension.self_test(Wrong) == "normals differ from the reference"  # type: ignore[arg-type]


@needs_cpp
def test_bench_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.sgld_step", "--sizes", "1000", "--seconds", "0.01", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (record,) = tmp_path.iterdir()
    ratios = json.loads(record.read_text())["results"]["1000"]["ratios"]
    assert all(value > 0 for value in ratios.values())
    assert len(ratios) == 3
