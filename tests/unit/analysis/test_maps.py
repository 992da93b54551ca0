"""Maps and clusters of planted blocks. UMAP compiles on first use, which takes most of the time of these tests."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import lossk
from lossk.analysis import Clusters, KernelMap, cluster, map_kernel
from planted import planted_kernel

LABELS = torch.arange(154) % 3
DEAD = 4


@pytest.fixture(scope="module")
def kernel() -> lossk.LossKernel:
    return planted_kernel(LABELS, dead=DEAD)


@pytest.fixture(scope="module")
def drawn(kernel: lossk.LossKernel) -> KernelMap:
    return map_kernel(kernel, num_neighbors=10)


def test_dead_samples_are_set_aside(drawn: KernelMap) -> None:
    assert drawn.coordinates.shape == (154, 2)
    assert drawn.coordinates.dtype == torch.float32
    assert drawn.dead.tolist() == [False] * 150 + [True] * DEAD
    assert torch.isnan(drawn.coordinates).all(dim=1).tolist() == drawn.dead.tolist()
    assert (drawn.index[drawn.dead] == -1).all()
    assert torch.isnan(drawn.distance[drawn.dead]).all()
    assert not (drawn.index[:, :, None] == torch.arange(150, 154)).any(), "nobody's neighbor is dead"


def test_distances_are_those_of_the_neighbors(kernel: lossk.LossKernel, drawn: KernelMap) -> None:
    found = kernel.neighbors(10)
    alive = ~kernel.dead
    torch.testing.assert_close(drawn.index, found.index)
    expected = (2 * (1 - found.correlation[alive])).clamp(min=0).sqrt()
    torch.testing.assert_close(drawn.distance[alive], expected)


def test_blocks_are_clusters(drawn: KernelMap) -> None:
    found = cluster(drawn, labels=LABELS)
    assert found.num_clusters == 3
    assert found.composition is not None
    assert found.composition.shape == (4, 3)
    assert sorted(found.composition[:3].max(dim=1).values.tolist()) == [50, 50, 50]
    assert int(found.composition.sum()) == 154
    assert found.composition[3].sum() == DEAD
    assert (found.labels[drawn.dead] == -1).all()


def test_the_same_seed_gives_the_same_map(kernel: lossk.LossKernel, drawn: KernelMap) -> None:
    again = map_kernel(kernel, num_neighbors=10, neighbors=kernel.neighbors(12))
    assert_same(again.coordinates, drawn.coordinates)
    other = map_kernel(kernel, num_neighbors=10, seed=1)
    assert not torch.equal(other.coordinates[:10], drawn.coordinates[:10])


def assert_same(a: Tensor, b: Tensor) -> None:
    np.testing.assert_array_equal(a.numpy(), b.numpy())


def test_composition_and_noise_of_given_points() -> None:
    rng = np.random.default_rng(3)
    blob = rng.normal(size=(40, 2)) * 0.1
    points = np.concatenate([blob, blob + 10, [[100.0, -50.0], [np.nan, np.nan]]])
    labels = torch.cat([torch.full((40,), 7), torch.full((40,), 2), torch.tensor([2, 7])])
    found = cluster(points, min_cluster_size=10, labels=labels)
    assert isinstance(found, Clusters)
    assert found.labels[-2:].tolist() == [-1, -1]
    assert found.probability[-2:].tolist() == [0.0, 0.0]
    assert found.classes is not None
    assert found.classes.tolist() == [2, 7]
    assert found.composition is not None
    assert sorted(found.composition[:2].tolist()) == [[0, 40], [40, 0]]
    assert found.composition[2].tolist() == [1, 1]


def test_too_few_points_are_no_cluster() -> None:
    found = cluster(np.zeros((5, 2)), min_cluster_size=10)
    assert found.labels.tolist() == [-1] * 5
    assert found.num_clusters == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dimensions": 0}, "dimensions must be at least 1, got 0"),
        ({"dimensions": 11}, "dimensions must be at most 10"),
        ({"num_neighbors": 1}, "num_neighbors must be at least 2, got 1"),
        ({"min_dist": 1.5}, "min_dist at most 1"),
        ({"min_dist": float("nan")}, "min_dist must be finite"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_bad_settings_are_refused(kernel: lossk.LossKernel, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        map_kernel(kernel, **settings)


def test_neighbors_of_another_size_are_refused(kernel: lossk.LossKernel) -> None:
    with pytest.raises(ValueError, match="neighbors must be of all 154 samples, at least 10 of each, got 154 of 5"):
        map_kernel(kernel, num_neighbors=10, neighbors=kernel.neighbors(5))


def test_a_map_of_nothing_alive_is_refused() -> None:
    kernel = lossk.LossKernel.from_traces(lossk.LossTraces(torch.ones(2, 5, 9)))
    with pytest.raises(ValueError, match="at least 4 live samples, got 0"):
        map_kernel(kernel)


@pytest.mark.slow
def test_three_dimensions_and_a_graph_in_many_parts() -> None:
    labels = torch.arange(300) % 10  # 10 blocks of 30, each joined to 8: ten parts
    drawn = map_kernel(planted_kernel(labels, shared=0.9), dimensions=3, num_neighbors=8)
    assert drawn.coordinates.shape == (300, 3)
    found = cluster(drawn, labels=labels)
    assert found.num_clusters == 10
    assert found.composition is not None
    assert found.composition[:10].max(dim=1).values.tolist() == [30] * 10


@pytest.mark.parametrize("count", [4, 5, 7])
def test_few_samples(count: int) -> None:
    kernel = planted_kernel(torch.arange(count) % 2)
    assert torch.isfinite(map_kernel(kernel).coordinates).all()
