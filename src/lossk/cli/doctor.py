"""`lossk doctor`: what is compiled, which backends pass their self-test, and why one does not."""

from __future__ import annotations

import argparse

import torch

from lossk import provenance


def run_doctor(options: argparse.Namespace) -> None:
    from lossk.ops.extension import status

    for package, version in provenance.versions().items():
        print(f"{package:12s} {version}")
    extension = status()
    if extension.available:
        print(f"backend cpp    ok: self-test passed, SIMD level {extension.simd}")
    else:
        print(f"backend cpp    not usable: {extension.reason}")
    print("backend torch  ok: the reference")
    devices = torch.cuda.device_count()
    for line in describe_triton(torch.device("cuda" if devices else "cpu")):
        print(f"backend triton {line}")
    print("backend cuda   not in this version: it has no CUDA C++ kernels, and backend='cuda' raises")
    print(f"CUDA devices   {devices}" + (f" ({torch.cuda.get_device_name(0)})" if devices else ""))
    print(f"torch threads  {torch.get_num_threads()}")


def describe_triton(device: torch.device) -> list[str]:
    """Each op's Triton kernel on `device`: passed, or why not; one line where the reason is the same for all."""
    from lossk.ops import triton_kernels

    found = {op: triton_kernels.status(op, device) for op in triton_kernels.OPS}
    reasons = {status.reason for status in found.values()}
    if len(reasons) == 1 and reasons != {""}:
        return [f"not usable: {reasons.pop()}"]
    how = "interpreted on the CPU" if next(iter(found.values())).interpreted else f"on {device}"
    return [
        f"{op:16s} {f'ok: self-test passed, {how}' if status.available else f'not usable: {status.reason}'}"
        for op, status in found.items()
    ]
