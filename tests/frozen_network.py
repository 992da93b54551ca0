"""A small network with everything that must stay frozen, its data, and its gradients by a slow loop in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Data = tuple[Tensor, Tensor]


def network() -> nn.Sequential:
    """Convolution, batch norm, dropout and an in-place activation: what a frozen model must get right."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Dropout(0.5),
            nn.Flatten(), nn.Linear(3 * 16, 5), nn.Tanh(), nn.Linear(5, 3),
        )  # fmt: skip
        model(torch.randn(50, 1, 4, 4))  # running statistics of their own
    return model


def images() -> Data:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(13, 1, 4, 4, generator=generator), torch.arange(13) % 3


def wide_gradients(model: nn.Module, data: Data, value: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """[N, P] float64, one sample at a time in eval mode."""
    model = model.double().eval()
    rows = []
    for x, y in zip(data[0].double(), data[1], strict=True):
        scalar = value(model(x[None])[0], y)
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(scalar, list(model.parameters()))]))
    return torch.stack(rows)


def entropy(logits: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(logits[None], label[None])
