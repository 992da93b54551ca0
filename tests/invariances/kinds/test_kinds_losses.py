"""Losses and batches: regression, several labels, soft labels, dictionaries, outputs of other people's models."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kinds import Kind, check

N, CLASSES = 12, 3


def inputs() -> Tensor:
    return torch.randn(N, 6)


def network(outputs: int = CLASSES) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, outputs))


def mean_square(model: nn.Module, batch: Any) -> Tensor:
    """[B]: the mean over a sample's outputs, by hand."""
    x, y = batch
    return (model(x).reshape(len(y), -1) - y.reshape(len(y), -1)).square().mean(dim=1)


class Decoder(nn.Module):
    """Images out."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.up = nn.Linear(6, 8), nn.ConvTranspose2d(2, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(torch.tanh(self.body(x)).view(-1, 2, 2, 2))


REGRESSION = {
    "scalar-regression": Kind(lambda: network(1), lambda: (inputs(), torch.randn(N)), "mse", mean_square),
    "column-regression": Kind(lambda: network(1), lambda: (inputs(), torch.randn(N, 1)), "mse", mean_square),
    "vector-regression": Kind(lambda: network(4), lambda: (inputs(), torch.randn(N, 4)), "mse", mean_square),
    "image-regression": Kind(Decoder, lambda: (inputs(), torch.randn(N, 1, 4, 4)), "mse", mean_square),
}


@pytest.mark.parametrize("kind", REGRESSION)
def test_regression(kind: str) -> None:
    check(REGRESSION[kind])


def several(model: nn.Module, batch: Any) -> Tensor:
    """Binary cross entropy, summed over a sample's labels."""
    x, y = batch
    return F.binary_cross_entropy_with_logits(model(x), y, reduction="none").sum(dim=1)


def binary(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return F.binary_cross_entropy_with_logits(model(x).squeeze(1), y.to(x.dtype), reduction="none")


def soft(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y, reduction="none")


def weighted(model: nn.Module, batch: Any, smoothing: float) -> Tensor:
    x, y = batch
    weights = torch.tensor([1.0, 2.0, 0.5], dtype=x.dtype)
    return F.cross_entropy(model(x), y, weight=weights, label_smoothing=smoothing, reduction="none")


class Focal:
    """A loss that is an object with settings."""

    def __init__(self, gamma: float) -> None:
        self.gamma = gamma

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        losses = F.cross_entropy(model(x), y, reduction="none")
        return (1 - torch.exp(-losses)) ** self.gamma * losses


class Huber(nn.Module):
    """A loss that is a module, with a weight of its own which is not sampled."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        return F.huber_loss(model(x), y, reduction="none").mean(dim=1) * self.scale.detach()


def autoencoder(model: nn.Module, batch: Any) -> Tensor:
    """Batches without targets."""
    (x,) = batch if isinstance(batch, tuple) else (batch,)
    return (model(x) - x).abs().mean(dim=1)


def contrast(model: nn.Module, batch: Any) -> Tensor:
    """Batches of three tensors."""
    anchor, positive, negative = (model(x) for x in batch)
    return F.triplet_margin_loss(anchor, positive, negative, margin=3.0, reduction="none")


def penalized(model: nn.Module, batch: Any) -> Tensor:
    """A term of the weights beside each sample's own."""
    x, y = batch
    return F.cross_entropy(model(x), y, reduction="none") + 0.1 * sum(p.square().sum() for p in model.parameters())


def many_labels() -> tuple[Tensor, Tensor]:
    return inputs(), (torch.rand(N, 4) < 0.4).float()


LOSSES: dict[str, Kind] = {
    "several-labels": Kind(lambda: network(4), many_labels, several, several),
    "binary": Kind(lambda: network(1), lambda: (inputs(), torch.arange(N) % 2), binary, binary),
    "soft-labels": Kind(network, lambda: (inputs(), torch.rand(N, CLASSES).softmax(dim=1)), soft, soft),
    "weighted-and-smoothed": Kind(
        network,
        lambda: (inputs(), torch.arange(N) % CLASSES),
        partial(weighted, smoothing=0.1),
        partial(weighted, smoothing=0.1),
    ),
    "loss-object": Kind(network, lambda: (inputs(), torch.arange(N) % CLASSES), Focal(2.0), Focal(2.0)),
    "loss-module": Kind(lambda: network(4), lambda: (inputs(), torch.randn(N, 4)), Huber(), Huber()),
    "no-targets": Kind(lambda: network(6), lambda: (inputs(),), autoencoder, autoencoder),
    "three-inputs": Kind(lambda: network(4), lambda: (inputs(), inputs(), inputs()), contrast, contrast),
    "penalty-on-weights": Kind(network, lambda: (inputs(), torch.arange(N) % CLASSES), penalized, penalized),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_losses(kind: str) -> None:
    check(LOSSES[kind])


class Keywords(nn.Module):
    """Takes its inputs by name, some of them optional."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.extra, self.head = nn.Linear(6, 8), nn.Linear(2, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor, context: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        hidden = self.body(x)
        if context is not None:
            hidden = hidden + self.extra(context)
        return self.head(torch.tanh(hidden)) * (1.0 if scale is None else scale[:, None])


def by_name() -> tuple[dict[str, Tensor], Tensor]:
    return {"x": inputs(), "context": torch.randn(N, 2)}, torch.arange(N) % CLASSES


def flat_dictionary() -> dict[str, Tensor]:
    return {"x": inputs(), "scale": torch.rand(N) + 0.5, "labels": torch.arange(N) % CLASSES}


def of_dictionary(model: nn.Module, batch: Any) -> Tensor:
    given = {name: value for name, value in batch.items() if name != "labels"}
    return F.cross_entropy(model(**given), batch["labels"], reduction="none")


def nested() -> dict[str, Any]:
    return {"views": (inputs(), torch.randn(N, 2)), "labels": torch.arange(N) % CLASSES}


def of_nested(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(*batch["views"]), batch["labels"], reduction="none")


def sequence_losses(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Losses per token and the mask of those that count."""
    x, y = batch
    losses = F.cross_entropy(model(x).transpose(1, 2), y, reduction="none", ignore_index=-100)
    return losses, y != -100


def of_unmasked(model: nn.Module, batch: Any) -> Tensor:
    losses, mask = sequence_losses(model, batch)
    return losses[mask]


def tagged() -> tuple[Tensor, Tensor]:
    """[N, 5, 6] and a label for each position, some of which do not count."""
    y = torch.randint(0, CLASSES, (N, 5))
    y[::3, 2:] = -100
    return torch.randn(N, 5, 6), y


BATCHES: dict[str, Kind] = {
    "inputs-by-name": Kind(Keywords, by_name),
    "dictionary-batch": Kind(Keywords, flat_dictionary, of_dictionary, of_dictionary),
    "nested-batch": Kind(Keywords, nested, of_nested, of_nested),
    "losses-per-token-by-a-callable": Kind(network, tagged, sequence_losses, of_unmasked),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_batches(kind: str) -> None:
    check(BATCHES[kind])
