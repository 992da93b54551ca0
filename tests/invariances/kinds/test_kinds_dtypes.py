"""Models in other precisions than float32: the truth is float64 at the very weights that they hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lossk
from kind_world import World
from kinds import Kind, apply, check, check_draws, short

N, CLASSES = 12, 3
HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES = HALF | {"float64": torch.float64}


def vectors(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(N, 6).to(dtype), torch.arange(N) % CLASSES


def images(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(N, 2, 6, 5).to(dtype), torch.arange(N) % CLASSES


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, CLASSES))


def convolutional() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(48, CLASSES))


def in_its_dtype(model: nn.Module, batch: Any) -> Tensor:
    """Cross entropy [B] of inputs that the user casts to the model's dtype; logits in float32 at least."""
    logits = apply(model, batch[0].to(next(model.parameters()).dtype))
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), batch[1], reduction="none")


class Mixed(nn.Module):
    """A body in half precision, a norm and a head in float32, each of which is given what it is in."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(6, 8).to(dtype), nn.LayerNorm(8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x.to(self.body.weight.dtype))
        return self.head(torch.tanh(self.norm(x.to(self.norm.weight.dtype))))


class Upcast(nn.Module):
    """Softmax in float32 and back, as language models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x.float().softmax(dim=-1).type_as(x))


KINDS = {f"{name}-model": Kind(lambda t=t: network().to(t), vectors, hand=in_its_dtype) for name, t in DTYPES.items()}
KINDS |= {
    f"{name}-model-and-inputs": Kind(lambda t=t: network().to(t), lambda t=t: vectors(t), hand=in_its_dtype)
    for name, t in DTYPES.items()
}
KINDS |= {
    f"{name}-convolutions-and-batch-norm": Kind(
        lambda t=t: convolutional().to(t), lambda t=t: images(t), hand=in_its_dtype
    )
    for name, t in DTYPES.items()
}
KINDS |= {
    f"{name}-body-float32-head": Kind(lambda t=t: Mixed(t), vectors, hand=in_its_dtype) for name, t in HALF.items()
}
KINDS["bfloat16-with-softmax-in-float32"] = Kind(
    lambda: Upcast().to(torch.bfloat16), vectors, hand=in_its_dtype, exact=torch.float32
)
KINDS["float32-model-float64-inputs"] = Kind(network, lambda: vectors(torch.float64), hand=in_its_dtype)
KINDS["float32-model-float16-inputs"] = Kind(network, lambda: vectors(torch.float16), hand=in_its_dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_dtypes(kind: str) -> None:
    check(KINDS[kind])


class Autocast(nn.Module):
    """Runs its body under autocast, whoever calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(6, 8), nn.Tanh()), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = self.body(x)
        return self.head(x.float())


def test_a_model_that_casts_by_itself() -> None:
    """Its roundings are coarse and jump, so that steps of another rounding are not compared."""
    kind = Kind(Autocast, vectors, exact=torch.float32)
    check_draws(kind)
    model = kind.model()
    world = World(model)
    kernel = lossk.build_kernel(model, kind.batch(), sampler=short(), num_chains=1, num_draws=3, progress=False)
    assert bool((kernel.variance > 0).all())
    world.assert_same()
