"""Which implementation of the ops a run uses."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lossk.checks import check_choice
from lossk.errors import BackendError
from lossk.settings import BACKENDS

OPS = ("sgld_step", "sample_loss", "head_loss", "rank_update", "top_correlations")
COMPILED = ("sgld_step", "sample_loss", "head_loss")  # what "cpp" does; the reference is the CPU's fast path elsewhere


@dataclass(frozen=True)
class Chosen:
    """A run's backend by name, and what each op runs with."""

    backend: str
    ops: dict[str, str]
    reasons: tuple[str, ...] = ()  # why an op runs with another backend than the run's name says


def choose_ops(backend: str, device: torch.device) -> Chosen:
    """What each op runs with: an explicit backend or an error, "auto" the fastest that passes its self-test.

    "auto" on a CUDA device takes the Triton kernel of every op whose kernel passes, and the reference for the others.

    Raises:
        ValueError: not a backend's name.
        BackendError: an explicit backend cannot run here; says why and what can.
    """
    chosen = resolve_backend(backend, device)
    if backend == "auto" and device.type == "cuda":
        return _by_self_test(device)
    if chosen == "cpp":
        return Chosen(chosen, {op: "cpp" if op in COMPILED else "torch" for op in OPS})
    return Chosen(
        chosen, dict.fromkeys(OPS, chosen), _not_compiled() if backend == "auto" and device.type == "cpu" else ()
    )


def _not_compiled() -> tuple[str, ...]:
    """Why "auto" is the reference on a CPU: it can be many times slower, so it is said."""
    from lossk.ops.extension import status

    return (f"ops = torch: {status().reason}",)


def _by_self_test(device: torch.device) -> Chosen:
    from lossk.ops import triton_kernels

    found = {op: triton_kernels.status(op, device) for op in OPS}
    ops = {op: "triton" if status.available else "torch" for op, status in found.items()}
    refused = tuple(f"{op} = torch: {status.reason}" for op, status in found.items() if not status.available)
    return Chosen("triton" if "triton" in ops.values() else "torch", ops, refused)


def resolve_backend(backend: str, device: torch.device) -> str:
    """The backend that will run: an explicit one or an error, "auto" the fastest that passes its self-test.

    Raises:
        ValueError: not a backend's name.
        BackendError: an explicit backend cannot run here; says why and what can.
    """
    check_choice("backend", backend, BACKENDS)
    if backend == "torch":
        return backend
    from lossk.ops.extension import status

    extension = status()
    cpp_runs = extension.available and device.type == "cpu"
    if backend == "auto":
        return _by_self_test(device).backend if device.type == "cuda" else "cpp" if cpp_runs else "torch"
    if backend == "cpp" and cpp_runs:
        return backend
    usable = "torch, cpp" if cpp_runs else "torch"
    if backend == "cpp":
        why = extension.reason if device.type == "cpu" else f"it runs on the CPU, the model is on {device}"
    elif backend == "triton":
        from lossk.ops import triton_kernels

        why = triton_kernels.refusal(device)
        if not why:
            return backend
    else:
        why = "this version has no CUDA C++ kernels"
        if device.type == "cuda":
            usable += "; triton where its self-test passes"
    raise BackendError(f"backend={backend!r} cannot run here: {why}; usable: {usable}")
