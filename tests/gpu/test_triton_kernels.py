"""Loading the Triton kernels: never at import, self-tested, refused with the reason where they cannot run."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lossk
from lossk.cli.doctor import describe_triton
from lossk.errors import BackendError
from lossk.ops import triton_kernels
from lossk.run.backends import choose_ops, resolve_backend

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
    assert importlib.import_module(f"lossk.ops.{op}").self_test(module, CPU) != ""


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


def test_an_explicit_backend_resolves_and_auto_chooses_it_on_a_gpu_only(triton_device: torch.device) -> None:
    assert resolve_backend("triton", triton_device) == "triton"
    assert (resolve_backend("auto", triton_device) == "triton") == (triton_device.type == "cuda")


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
        lines = [line for line in told.stdout.splitlines() if line.startswith("backend triton")]
        if not torch.cuda.is_available():
            assert all(expected in line for line in lines)
            assert len(lines) == (len(triton_kernels.OPS) if expected == "interpreted" else 1)
        assert "backend cuda   not in this version" in told.stdout


def test_doctor_tells_which_kernel_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernels, "_load", half_broken)
    lines = {line.split()[0]: line for line in describe_triton(CPU)}
    assert "not usable: its numbers are off" in lines["rank_update"]
    assert "ok: self-test passed" in lines["sgld_step"]


def half_broken(op: str, device: torch.device) -> tuple[triton_kernels.KernelStatus, Any]:
    """One kernel that fails its self-test, four that pass."""
    good = op != "rank_update"
    return triton_kernels.KernelStatus(good, "" if good else "its numbers are off", True), object() if good else None


# --- which backend "auto" takes on a GPU -------------------------------------------------------------------------

CUDA = torch.device("cuda")  # only named: nothing is put there


def test_auto_on_a_gpu_takes_every_kernel_that_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    def passing(op: str, device: torch.device) -> tuple[triton_kernels.KernelStatus, Any]:
        return triton_kernels.KernelStatus(True, "", False), object()

    monkeypatch.setattr(triton_kernels, "_load", passing)
    chosen = choose_ops("auto", CUDA)
    assert chosen.backend == resolve_backend("auto", CUDA) == "triton"
    assert set(chosen.ops) == set(triton_kernels.OPS)
    assert set(chosen.ops.values()) == {"triton"}
    assert chosen.reasons == ()


def test_auto_on_a_gpu_leaves_out_a_kernel_that_fails_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernels, "_load", half_broken)
    chosen = choose_ops("auto", CUDA)
    assert chosen.backend == "triton"
    assert chosen.ops["rank_update"] == "torch"
    assert chosen.ops["head_loss"] == "triton"
    assert chosen.reasons == ("rank_update = torch: its numbers are off",)
    with pytest.raises(BackendError, match="its numbers are off"):
        choose_ops("triton", CUDA)


def test_without_any_kernel_auto_on_a_gpu_is_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    chosen = choose_ops("auto", CUDA)
    assert chosen.backend == "torch"
    assert set(chosen.ops.values()) == {"torch"}
    assert len(chosen.reasons) == len(triton_kernels.OPS)


def test_what_each_op_runs_with_on_a_cpu() -> None:
    ops = choose_ops("cpp", CPU).ops
    assert ops == dict.fromkeys(triton_kernels.OPS, "torch") | dict.fromkeys(
        ("sgld_step", "sample_loss", "head_loss"), "cpp"
    )
    assert set(choose_ops("torch", CPU).ops.values()) == {"torch"}


def test_cuda_is_no_backend_yet_and_says_so() -> None:
    for device in (CPU, CUDA):
        with pytest.raises(BackendError, match=r"backend='cuda' cannot run here: .* has no CUDA C\+\+ kernels"):
            resolve_backend("cuda", device)


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
