"""Forward passes of the network of GoogLeNet's size in the variants that matter, for `bench.first_gpu`.

Images and, by 3.163 GFLOP an image at 224 x 224, TFLOP a second: of precisions, batches, folded norms, cuDNN's choice
among its algorithms by the clock, weights that are bfloat16 already, and torch.compile.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.gpu import milliseconds
from bench.gpu_build import as_floats, network
from lossk.float32 import float32_products
from lossk.task.fold import fold_norms

FLOPS = 3.163e9  # of one image of 224 x 224 through the network at width 1: a multiplication and an addition are two


@dataclass(frozen=True)
class ForwardSizes:
    """Of the images and batches."""

    side: int = 224
    width: float = 1.0
    batches: tuple[int, ...] = (256, 1024, 2048)


TINY_FORWARD = ForwardSizes(side=32, width=0.05, batches=(2, 3))


@dataclass(frozen=True)
class Variant:
    """One way of running the network."""

    name: str
    model: Callable[[Tensor], Tensor]
    batch: int
    precision: str | None = "bf16"  # "bf16" by autocast, "held": weights and images are bfloat16; "tf32"; None: float32
    tried: bool = False  # cuDNN tries its algorithms

    def run(self, images: Tensor) -> Callable[[], object]:
        """A call of it."""

        def call() -> Tensor:
            inputs = as_floats(images)
            if self.precision == "held":
                return self.model(inputs.to(torch.bfloat16))
            with torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                return self.model(inputs)

        return call


def variants(model: nn.Module, batches: tuple[int, ...]) -> Iterator[Variant]:
    """Each made when it is asked for."""
    most = batches[-1]
    yield from (Variant("bf16", model, batch) for batch in batches)
    yield Variant("float32", model, batches[0], None)
    yield Variant("tf32", model, most, "tf32")
    yield Variant("bf16, cuDNN tries", model, most, tried=True)
    folded = fold_norms(model)
    if folded is not None:
        yield Variant("bf16, folded at every pass", folded, most)
        yield Variant("bf16, folded at every pass, cuDNN tries", folded, most, tried=True)
    held = folded_once(model).to(torch.bfloat16)
    yield Variant("bf16 weights, folded once", held, most, "held", tried=True)
    yield Variant("bf16 weights, folded once, compiled", torch.compile(held), most, "held", tried=True)


def folded_once(model: nn.Module) -> nn.Module:
    """A copy whose convolutions have taken in the norms after them."""
    out = copy.deepcopy(model)
    for part in out.modules():
        if isinstance(part, nn.Sequential) and len(part) > 1 and isinstance(part[1], nn.BatchNorm2d):
            part[0] = nn.utils.fusion.fuse_conv_bn_eval(part[0], part[1])
            part[1] = nn.Identity()
    return out


def measure(sizes: ForwardSizes, device: torch.device, write: Callable[[dict[str, Any]], None]) -> None:
    """Every variant; `write` is given what is known after each."""
    torch.manual_seed(0)
    model = network(1000, sizes.width).eval().requires_grad_(False).to(device).to(memory_format=torch.channels_last)
    rows: list[dict[str, Any]] = []
    before = torch.backends.cudnn.benchmark
    try:
        for variant in variants(model, sizes.batches):
            rows.append(_row(variant, sizes, device))
            write({"rows": rows})
    finally:
        torch.backends.cudnn.benchmark = before


def _row(variant: Variant, sizes: ForwardSizes, device: torch.device) -> dict[str, Any]:
    torch.backends.cudnn.benchmark = variant.tried
    shape = (variant.batch, 3, sizes.side, sizes.side)
    row: dict[str, Any] = {"name": variant.name, "batch": variant.batch}
    try:
        images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.inference_mode(), float32_products(tf32=variant.precision == "tf32"):
            seconds = statistics.median(milliseconds(variant.run(images), device, rounds=5)) / 1e3
    except Exception as error:  # one variant that cannot run says so, and the next one is tried
        return row | {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    rate = variant.batch / seconds
    return row | {"images_per_second": rate, "tflops": rate * FLOPS * (sizes.side / 224) ** 2 / 1e12}
