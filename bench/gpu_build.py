"""An end-to-end build on a GPU: a network of GoogLeNet's size over synthetic images, by stage, for `bench.gpu`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import lossk
from lossk.accumulate.tiles import TileAccumulator
from lossk.device import settle
from lossk.ops.sgld_step import sgld_step

# Channels of Szegedy et al., "Going deeper with convolutions" (2015), table 1: 1x1, 3x3 reduced, 3x3, 5x5 reduced, 5x5,
# after the pool; None is a pool of stride 2.
INCEPTIONS: tuple[tuple[int, ...] | None, ...] = (
    (64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64), None, (192, 96, 208, 16, 48, 64),
    (160, 112, 224, 24, 64, 64), (128, 128, 256, 24, 64, 64), (112, 144, 288, 32, 64, 64),
    (256, 160, 320, 32, 128, 128), None, (256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128),
)  # fmt: skip


@dataclass(frozen=True)
class BuildSizes:
    """Of the build. `width` scales every channel."""

    images: int = 50_000
    side: int = 224
    classes: int = 1000
    width: float = 1.0
    draws: int = 3
    steps: int = 8  # of a draw
    batch: int = 256
    tile: int = 4096
    precision: str | None = "bf16"


TINY_BUILD = BuildSizes(images=17, side=32, classes=3, width=0.05, draws=2, steps=1, batch=4, tile=16, precision=None)


def convolution(channels: int, out: int, size: int, stride: int = 1) -> nn.Sequential:
    """With batch norm, as in the network's later form."""
    layer = nn.Conv2d(channels, out, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(out), nn.ReLU())


class Inception(nn.Module):
    """Four branches side by side."""

    def __init__(self, channels: int, one: int, low3: int, three: int, low5: int, five: int, pooled: int) -> None:
        super().__init__()
        self.one = convolution(channels, one, 1)
        self.three = nn.Sequential(convolution(channels, low3, 1), convolution(low3, three, 3))
        self.five = nn.Sequential(convolution(channels, low5, 1), convolution(low5, five, 5))
        self.pooled = nn.Sequential(nn.MaxPool2d(3, 1, 1), convolution(channels, pooled, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pooled(x)], dim=1)


def network(classes: int, width: float) -> nn.Sequential:
    """GoogLeNet without its auxiliary heads: 7.0 million weights at width 1 with 1,000 classes."""

    def wide(channels: int) -> int:
        return max(1, round(channels * width))

    layers: list[nn.Module] = [convolution(3, wide(64), 7, 2), nn.MaxPool2d(3, 2, 1)]
    layers += [convolution(wide(64), wide(64), 1), convolution(wide(64), wide(192), 3), nn.MaxPool2d(3, 2, 1)]
    channels = wide(192)
    for sizes in INCEPTIONS:
        if sizes is None:
            layers.append(nn.MaxPool2d(3, 2, 1))
            continue
        parts = [wide(size) for size in sizes]
        layers.append(Inception(channels, *parts))
        channels = parts[0] + parts[2] + parts[4] + parts[5]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def as_floats(images: Tensor) -> Tensor:
    """uint8 images, normalised batch by batch on the device."""
    return (images.float() - 127.5) / 64.0


def measure(sizes: BuildSizes, device: torch.device, seconds_of: Callable[[Callable[[], object]], float]) -> Any:
    """Build a kernel and split its time; seconds per draw of each stage.

    Args:
        seconds_of: times a call on the device.
    """
    torch.manual_seed(0)
    model = network(sizes.classes, sizes.width).to(device)
    images = torch.randint(0, 256, (sizes.images, 3, sizes.side, sizes.side), dtype=torch.uint8)
    labels = torch.arange(sizes.images) % sizes.classes
    sampler = lossk.SGLD(
        lr=1e-7, n_beta=100.0, localization=100.0, batch_size=sizes.batch,
        num_burnin_steps=0, num_steps_bw_draws=sizes.steps,
    )  # fmt: skip
    settings: dict[str, Any] = {
        "num_chains": 1, "num_draws": sizes.draws, "tile": sizes.tile, "backend": "triton", "sampler": sampler,
        "transform": as_floats, "precision": sizes.precision,
    }  # fmt: skip
    kernel = lossk.build_kernel(model, (images, labels), **settings)
    settle(device)
    passes, beside = lossk.Passes(**kernel.meta["passes"]), None
    if passes.overlap is True:  # stages are told apart only where they take turns
        beside = sampling_seconds(kernel) / sizes.draws
        kernel = lossk.build_kernel(model, (images, labels), passes=replace(passes, overlap=False), **settings)
        settle(device)
    spent, draws = kernel.meta["timings"], sizes.draws
    stages = {"forward": spent["probe"] / draws, "gradient": spent["gradient"] / draws}
    weights = torch.zeros(3, sum(p.numel() for p in model.parameters()), device=device)
    stages["step"] = sizes.steps * seconds_of(lambda: _step(*weights))
    stages["update"] = _update_seconds(sizes, device, seconds_of)
    return {
        "stages": stages,
        "sampling": {"turns": sampling_seconds(kernel) / draws, "beside": beside},
        "thousand_draws_seconds": 1000 * sum(stages.values()),
        "update_of_forward": stages["update"] / stages["forward"],
        "weights": weights.shape[1],
        "total_seconds": spent["total"],
        "passes": passes.to_dict(),
        "passes_reasons": kernel.meta["passes_reasons"],
        "memory": kernel.meta["memory"],
        "ops": kernel.meta["ops"],
    }


def sampling_seconds(kernel: lossk.LossKernel) -> float:
    """Of passes and steps, by the host's clock; it waits for the device at every step and after every pass."""
    return sum(kernel.meta["timings"].get(stage, 0.0) for stage in ("probe", "gradient", "step"))


def _step(w: Tensor, grad: Tensor, anchor: Tensor) -> None:
    sgld_step(
        w, grad, anchor, lr=1e-7, n_beta=100.0, localization=100.0, seed=0, chain=0, step=0, backend="triton"
    )  # fmt: skip


def _update_seconds(
    sizes: BuildSizes, device: torch.device, seconds_of: Callable[[Callable[[], object]], float]
) -> float:
    """Of a draw's share of a panel's update, by itself: in a build it runs beside the next draws."""
    panel = 200 if sizes.images > 1000 else 2
    tiles = TileAccumulator(
        sizes.images, sizes.tile, num_chains=1, num_draws=10**6, device=device, backend="triton", precision="tf32x3"
    )
    losses = torch.rand(panel, sizes.images, device=device)

    def update() -> None:
        tiles.update(0, losses)
        tiles.join()

    return seconds_of(update) / panel
