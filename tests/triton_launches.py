"""Run by test_triton_aot.py in a process of its own: what a launch on a GPU would compile, asked of Triton without one.

A stand-in for the GPU's driver says "sm_90"; `warmup` then goes through everything a launch does but the launch. Prints
"ok" if types and specialisations are those that `bench.aot` compiles.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from bench.aot import MODULES
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from lossk.kernels.launch import COMPILED_AS, Config


class NoGpu:
    """The questions Triton asks before it launches anything."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


checked: list[str] = []


def check(config: Config, programs: int, *arguments: Any) -> None:
    """In place of `launch`: compile, and compare with the configuration's own account of itself."""
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, **COMPILED_AS}
    source = config.kernel.warmup(*arguments, **config.constants, **options, grid=(programs,)).src
    name = config.kernel.__name__
    types = [kind for kind in source.signature.values() if kind != "constexpr"]
    assert types == config.types, (name, types, config.types)
    specialised = {index for (index,), found in source.attrs.items() if found}
    pointers = {i for i, kind in enumerate(source.signature.values()) if kind.startswith("*")}
    assert specialised == pointers, (name, specialised, pointers)
    checked.append(name)


def main() -> None:
    driver.set_active(NoGpu())
    modules = {name: importlib.import_module(f"lossk.kernels.{name}") for name in MODULES}
    for module in modules.values():
        module.launch = check  # type: ignore[attr-defined]
    labels, square = torch.zeros(16, dtype=torch.int64), torch.zeros(16, 16)
    step = {"lr": 0.1, "n_beta": 1.0, "localization": 1.0, "alpha": 0.9, "stability": 0.1, "update_square_avg": True}
    modules["sgld_step"].sgld_step(*[torch.zeros(1024)] * 4, **step, seed=2**32 - 1, chain=1, step=16)
    modules["rank_update"].rank_update(square, square, square, triangle=True, precision="fp32", scaling=None)
    modules["sample_loss"].sample_loss(square, labels, torch.zeros(16), -100)
    modules["head_loss"].head_loss(square, square.unsqueeze(0), None, labels, torch.zeros(1, 16), "tf32", -100)
    keys = torch.zeros(16, 16, dtype=torch.int64)
    modules["top_correlations"].top_correlations(keys, square, square[0], square[0], 0, 0)
    modules["normals"].fill(torch.zeros(1024), 1, 2, 3)
    assert len(checked) == len(MODULES) + 1, checked  # head_loss launches two
    print("ok")


if __name__ == "__main__":
    main()
