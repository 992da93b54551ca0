"""Loading the Triton kernels: never at import, self-tested, refused with the reason where they cannot run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lossk
from lossk.backends import resolve_backend
from lossk.errors import BackendError
from lossk.ops import triton_kernels, triton_self_tests

CPU = torch.device("cpu")


def test_importing_lossk_does_not_import_triton() -> None:
    check = "import sys, lossk, lossk.ops.triton_kernels; assert not [m for m in sys.modules if m.startswith('triton')]"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)


@pytest.mark.parametrize("op", triton_kernels.OPS)
def test_every_kernel_passes_its_self_test(op: str, triton_device: torch.device) -> None:
    found = triton_kernels.status(op, triton_device)
    assert found.available, found.reason
    assert found.interpreted == (triton_device == CPU)


@pytest.mark.parametrize("op", triton_kernels.OPS)
@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_the_self_test_notices_a_kernel_that_writes_rubbish(op: str, value: float) -> None:
    """TRAK's users got zeros from a mismatched build: every output zero, or not a number, must be noticed."""

    def rubbish(*arguments: object, **options: object) -> None:
        for argument in arguments:
            if isinstance(argument, torch.Tensor) and argument.is_floating_point():
                argument.fill_(value)

    module = SimpleNamespace(**{op: rubbish})
    assert getattr(triton_self_tests, op)(module, CPU) != ""


def test_refused_on_a_cpu_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendError, match=r"need a CUDA device, and this is cpu \(TRITON_INTERPRET=1"):
        triton_kernels.load("sample_loss", CPU)
    with pytest.raises(BackendError, match="need a CUDA device"):
        resolve_backend("triton", CPU)


def test_without_triton_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(BackendError, match="triton does not import"):
        triton_kernels.load("sample_loss", CPU)


def test_an_explicit_backend_resolves_and_auto_does_not_choose_it(triton_device: torch.device) -> None:
    assert resolve_backend("triton", triton_device) == "triton"
    assert resolve_backend("auto", triton_device) != "triton"


def test_doctor_tells_of_every_kernel() -> None:
    for interpret, expected in (("1", "interpreted"), ("0", "not usable")):
        told = subprocess.run(
            [sys.executable, "-m", "lossk", "doctor"],
            env=os.environ | {"TRITON_INTERPRET": interpret},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        line = next(line for line in told.stdout.splitlines() if line.startswith("backend triton"))
        if not torch.cuda.is_available():
            assert expected in line


def test_a_kernel_built_with_the_triton_step(
    build: Callable[..., lossk.LossKernel], problem: Any, triton_device: torch.device
) -> None:
    """The same noise, so the same chains to rounding; `meta` says what ran."""
    model = problem.model().to(triton_device)
    kernel = build(model, problem.data, backend="triton", num_draws=3)
    reference = build(problem.model(), problem.data, num_draws=3)
    assert kernel.meta["backend"] == "triton"
    scale = reference.variance.max()
    torch.testing.assert_close(kernel[:, :], reference[:, :], rtol=1e-3, atol=float(scale) * 1e-4)
