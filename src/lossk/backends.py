"""Which implementation of the ops a run uses."""

from __future__ import annotations

import torch

from lossk.errors import BackendError
from lossk.settings import BACKENDS, check_choice


def resolve_backend(backend: str, device: torch.device) -> str:
    """The backend that will run: an explicit one or an error, "auto" the fastest that passes its self-test.

    "auto" does not choose "triton": no GPU has been at hand to show that it pays.

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
        return "cpp" if cpp_runs else "torch"
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
    raise BackendError(f"backend={backend!r} cannot run here: {why}; usable: {usable}")
