"""How kernels are launched, and what the launchers share with the ahead-of-time compiler."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

POINTERS = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32", "int32": "*i32", "int64": "*i64"}

# A rounding happens where the source says so: what the self-test passes is then what the interpreter's tests passed,
# and tl.fma is written where a fused multiply-add is meant.
COMPILED_AS = {"enable_fp_fusion": False}


@dataclass(frozen=True)
class Config:
    """One compiled form of a kernel: what a launcher can choose, and what `bench.aot` compiles."""

    kernel: Any  # the triton.jit function
    label: str
    types: list[str]  # of the arguments that are not constants, in order
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3


def launch(config: Config, programs: int, *arguments: Any) -> None:
    """Run `programs` programs of a configuration, on the device of the first argument."""
    # The interpreter computes in numpy, which warns of overflows and NaN that kernels handle as a GPU does.
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"), torch.cuda.device_of(arguments[0]):
        config.kernel[(programs,)](
            *arguments, **config.constants, num_warps=config.num_warps, num_stages=config.num_stages, **COMPILED_AS
        )


def processors(device: torch.device) -> int:
    """The multiprocessors of a GPU. Of the interpreter 2, fewer than there are blocks: programs take several there."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def pointer(dtype: str) -> str:
    """Triton's name for a pointer to `dtype`, one of torch's names."""
    return POINTERS[dtype]


def name_of(dtype: torch.dtype) -> str:
    """torch.float32 -> "float32"."""
    return str(dtype).removeprefix("torch.")


def signed(word: int) -> int:
    """A 32-bit word as the int32 of the same bits, so that a kernel sees one type whatever the value."""
    return word - 2**32 if word >= 2**31 else word
