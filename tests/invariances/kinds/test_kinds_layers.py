"""Layers: norms, weight and spectral norm, dropouts, embeddings, containers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import lossk
from kind_world import World
from kinds import Kind, check, short

N, CLASSES = 12, 3


def labels() -> Tensor:
    return torch.arange(N) % CLASSES


def vectors() -> tuple[Tensor, Tensor]:
    return torch.randn(N, 6), labels()


def signals() -> tuple[Tensor, Tensor]:
    return torch.randn(N, 2, 7), labels()


def images() -> tuple[Tensor, Tensor]:
    return torch.randn(N, 2, 6, 5), labels()


def volumes() -> tuple[Tensor, Tensor]:
    return torch.randn(N, 2, 4, 3, 5), labels()


def on_vectors(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), *layers, nn.Tanh(), nn.Linear(8, CLASSES))


def on_grids(dimensions: int, *layers: nn.Module) -> nn.Module:
    """A convolution, the layers on its 4 channels, a linear head."""
    convolution = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dimensions]
    size = {1: 4 * 5, 2: 4 * 4 * 3, 3: 4 * 2 * 1 * 3}[dimensions]
    return nn.Sequential(convolution(2, 4, 3), *layers, nn.Tanh(), nn.Flatten(), nn.Linear(size, CLASSES))


def grids(dimensions: int, *make: Callable[[], nn.Module]) -> Kind:
    return Kind(lambda: on_grids(dimensions, *(f() for f in make)), [signals, images, volumes][dimensions - 1])


def flat(*make: Callable[[], nn.Module]) -> Kind:
    return Kind(lambda: on_vectors(*(f() for f in make)), vectors)


NORMS = {
    "batch-norm-1d": flat(lambda: nn.BatchNorm1d(8)),
    "batch-norm-1d-on-signals": grids(1, lambda: nn.BatchNorm1d(4)),
    "batch-norm-2d": grids(2, lambda: nn.BatchNorm2d(4)),
    "batch-norm-3d": grids(3, lambda: nn.BatchNorm3d(4)),
    "batch-norm-without-weights": grids(2, lambda: nn.BatchNorm2d(4, affine=False)),
    "batch-norm-of-all-past-batches": grids(2, lambda: nn.BatchNorm2d(4, momentum=None)),
    "sync-batch-norm": grids(2, lambda: nn.SyncBatchNorm(4)),
    "layer-norm": flat(lambda: nn.LayerNorm(8)),
    "layer-norm-without-weights": flat(lambda: nn.LayerNorm(8, elementwise_affine=False)),
    "group-norm": grids(2, lambda: nn.GroupNorm(2, 4)),
    "instance-norm-1d": grids(1, lambda: nn.InstanceNorm1d(4, affine=True)),
    "instance-norm-2d": grids(2, lambda: nn.InstanceNorm2d(4)),
    "instance-norm-with-running-statistics": grids(
        2, lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    ),
    "instance-norm-3d": grids(3, lambda: nn.InstanceNorm3d(4, affine=True)),
    "rms-norm": flat(lambda: nn.RMSNorm(8)),
    "local-response-norm": grids(2, lambda: nn.LocalResponseNorm(3)),
}


@pytest.mark.parametrize("kind", NORMS)
def test_norms(kind: str) -> None:
    check(NORMS[kind])


def reparametrized(function: Callable[[nn.Module], nn.Module]) -> Kind:
    return Kind(
        lambda: nn.Sequential(function(nn.Linear(6, 8)), nn.Tanh(), function(nn.Linear(8, CLASSES))),
        vectors,
    )


REPARAMETRIZED = {
    "weight-norm": reparametrized(parametrizations.weight_norm),
    "weight-norm-of-a-convolution": Kind(
        lambda: nn.Sequential(
            parametrizations.weight_norm(nn.Conv2d(2, 4, 3)), nn.ReLU(), nn.Flatten(), nn.Linear(48, CLASSES)
        ),
        images,
    ),
    "spectral-norm": reparametrized(parametrizations.spectral_norm),
    # Householder's map reads its weights' signs by `.int()`: the function itself jumps at w*, so Cayley's is compared.
    "orthogonal": reparametrized(lambda layer: parametrizations.orthogonal(layer, orthogonal_map="cayley")),
}


@pytest.mark.parametrize("kind", REPARAMETRIZED)
def test_parametrizations(kind: str) -> None:
    check(REPARAMETRIZED[kind])


class DropPath(nn.Module):
    """Leaves out a sample's residual branch at random while training."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = torch.rand(len(x), *[1] * (x.ndim - 1)) < 0.7
        return x * kept / 0.7


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch, self.drop = nn.Sequential(nn.Linear(8, 8), nn.GELU()), DropPath()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.branch(x))


class FunctionalDropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.4, training=self.training)


DROPOUTS = {
    "dropout": flat(lambda: nn.Dropout(0.5)),
    "dropout-2d": grids(2, lambda: nn.Dropout2d(0.5)),
    "alpha-dropout": flat(lambda: nn.AlphaDropout(0.3)),
    "functional-dropout": flat(FunctionalDropout),
    "drop-path": flat(Residual, Residual),
    "randomized-relu": flat(nn.RReLU),
}


@pytest.mark.parametrize("kind", DROPOUTS)
def test_dropouts(kind: str) -> None:
    check(DROPOUTS[kind])


def tokens() -> tuple[Tensor, Tensor]:
    """[N, 5] indices below 11, of which 0 is padding."""
    index = torch.randint(1, 11, (N, 5))
    index[::3, 3:] = 0
    return index, labels()


class Bag(nn.Module):
    """The mean of a sample's embeddings."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(11, 6, mode=mode, padding_idx=0)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.bag(x)))


class Offsets(Bag):
    """The older calling form of a bag: all indices in one row, and where each sample begins."""

    def forward(self, x: Tensor) -> Tensor:
        start = torch.arange(len(x)) * x.shape[1]
        return self.head(torch.tanh(self.bag(x.flatten(), start)))


def embedded(**settings: object) -> nn.Module:
    return nn.Sequential(nn.Embedding(11, 6, **settings), nn.Flatten(), nn.Tanh(), nn.Linear(30, CLASSES))  # type: ignore[arg-type]


EMBEDDINGS = {
    "embedding": Kind(embedded, tokens),
    "embedding-with-padding": Kind(lambda: embedded(padding_idx=0), tokens),
    "embedding-bag-mean": Kind(lambda: Bag("mean"), tokens),
    "embedding-bag-max": Kind(lambda: Bag("max"), tokens),
    "embedding-bag-with-offsets": Kind(lambda: Offsets("sum"), tokens),
}


@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_embeddings(kind: str) -> None:
    check(EMBEDDINGS[kind])


def test_an_embedding_with_a_largest_norm() -> None:
    """Its forward pass changes weights, so a chain would step from others than were drawn: refused by name."""
    kind = Kind(lambda: embedded(max_norm=1.0), tokens)
    model = kind.model()
    world = World(model)
    with pytest.raises(ValueError, match=r"writes into parameter '0.weight'"):
        lossk.build_kernel(model, kind.batch(), sampler=short(), progress=False)
    world.assert_same()
