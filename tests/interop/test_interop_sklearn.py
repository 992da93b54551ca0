"""The kernel in scikit-learn: its own estimator checks, precomputed matrices, and sparse neighbor graphs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.cluster import HDBSCAN, SpectralClustering
from sklearn.decomposition import PCA, KernelPCA
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import KNeighborsClassifier, KNeighborsTransformer, NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.svm import SVC
from sklearn.utils.estimator_checks import parametrize_with_checks

import lossk
from lossk.interop import sklearn as interop

GROUPS, EACH = 3, 12


def planted(dead: tuple[int, ...] = ()) -> lossk.LossTraces:
    """Groups of samples whose losses share a factor of their own; some that never vary."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(2, 100, GROUPS, generator=generator)
    losses = factors[:, :, torch.arange(GROUPS * EACH) % GROUPS] + 0.5 * torch.randn(
        2, 100, GROUPS * EACH, generator=generator
    )
    losses[:, :, list(dead)] = 0.3
    return lossk.LossTraces(losses + 2.0)


LABELS = np.arange(GROUPS * EACH) % GROUPS


@pytest.fixture(scope="module")
def kernel() -> lossk.LossKernel:
    return lossk.LossKernel.from_traces(planted())


@parametrize_with_checks([interop.LossKernelTransformer(), interop.LossKernelTransformer(output="features")])
def test_estimator_checks(estimator: Any, check: Any) -> None:
    if getattr(check, "func", check).__name__ == "check_array_api_input":
        return  # scikit-learn itself passes over it unless SCIPY_ARRAY_API is set before SciPy is imported
    check(estimator)


@pytest.mark.parametrize("correlation", [True, False])
def test_features_are_a_root_of_the_kernel(kernel: lossk.LossKernel, correlation: bool) -> None:
    x = interop.losses(planted())
    expected = kernel.to_numpy(correlation=correlation)
    settings: dict[str, Any] = {"correlation": correlation, "num_chains": 2}
    features = interop.LossKernelTransformer(output="features", **settings).fit_transform(x)
    assert features.dtype == np.float32
    assert np.abs(features @ features.T - expected).max() < 1e-5
    gram = interop.LossKernelTransformer(**settings).fit(x[:20]).transform(x)
    assert np.abs(gram - expected[:, :20]).max() < 1e-5


def test_a_loss_that_never_varies_is_no_ones_neighbor() -> None:
    x = interop.losses(planted(dead=(4,)))
    gram = interop.LossKernelTransformer().fit_transform(x)
    assert (gram[4] == 0).all()
    assert np.isfinite(gram).all()


def test_pipelines_and_cross_validation() -> None:
    x = interop.losses(planted())
    model = make_pipeline(interop.LossKernelTransformer(num_chains=2), SVC(kernel="precomputed"))
    assert cross_val_score(model, x, LABELS, cv=3).mean() > 0.95


def test_bad_chains_are_refused() -> None:
    with pytest.raises(ValueError, match="num_chains must divide"):
        interop.LossKernelTransformer(num_chains=3).fit(np.random.default_rng(0).normal(size=(4, 10)))
    with pytest.raises(ValueError, match="output must be one of"):
        interop.LossKernelTransformer(output="matrix").fit(np.ones((4, 10)))


def test_precomputed_matrices(kernel: lossk.LossKernel) -> None:
    clusters = SpectralClustering(GROUPS, affinity="precomputed", random_state=0).fit_predict(interop.affinity(kernel))
    assert len({(c, y) for c, y in zip(clusters, LABELS, strict=True)}) == GROUPS
    gram = interop.gram(kernel)
    components = KernelPCA(2, kernel="precomputed").fit_transform(gram)
    features = interop.LossKernelTransformer(output="features", num_chains=2).fit_transform(interop.losses(planted()))
    assert np.abs(np.abs(components) - np.abs(PCA(2).fit_transform(features))).max() < 1e-3
    assert SVC(kernel="precomputed").fit(gram, LABELS).score(gram, LABELS) == 1.0
    distances = interop.distance(kernel)
    near, index = NearestNeighbors(n_neighbors=4, metric="precomputed").fit(distances).kneighbors()
    assert np.array_equal(np.sort(index), np.sort(kernel.neighbors(4).index.numpy()))
    assert np.allclose(near, np.sqrt(2 - 2 * kernel.neighbors(4).correlation.numpy()), atol=1e-3)


def test_distances_are_distances() -> None:
    traces = planted(dead=(3,))
    traces.losses[:, :, 7] = traces.losses[:, :, 5]  # a twin, whose distance rounding could make negative or NaN
    kernel = lossk.LossKernel.from_traces(lossk.LossTraces(traces.losses))
    distances, affinity = interop.distance(kernel), interop.affinity(kernel)
    assert (np.diag(distances) == 0).all()
    assert np.array_equal(distances, distances.T)
    assert 0 <= distances[5, 7] < 1e-3
    assert np.allclose(np.delete(distances[3], 3), 2**0.5)
    assert (affinity >= 0).all()
    assert (np.diag(affinity) == 1).all()


@pytest.mark.parametrize("mode", ["distance", "connectivity"])
def test_the_graph_is_that_of_kneighborstransformer(kernel: lossk.LossKernel, mode: Any) -> None:
    graph = interop.neighbor_graph(kernel, 5, mode=mode)
    theirs = KNeighborsTransformer(mode="distance", n_neighbors=5, metric="precomputed").fit_transform(
        interop.distance(kernel)
    )
    assert graph.shape == theirs.shape
    assert (np.diff(graph.indptr) == 6).all()
    assert np.array_equal(np.sort(graph.indices.reshape(-1, 6)), np.sort(theirs.indices.reshape(-1, 6)))
    if mode == "distance":
        assert (np.diff(graph.data.reshape(-1, 6)) >= 0).all()
        assert np.allclose(graph.data, theirs.data, atol=1e-3)
    predictor = KNeighborsClassifier(5, metric="precomputed").fit(graph, LABELS)
    if mode == "distance":
        assert predictor.score(graph, LABELS) == 1.0


def test_dead_samples_in_graphs() -> None:
    kernel = lossk.LossKernel.from_traces(planted(dead=(0, 9)))
    index, distances = interop.knn(kernel, 4)
    assert index[0].tolist() == [0, 1, 2, 3, 4]
    assert index[9].tolist() == [9, 0, 1, 2, 3]
    assert np.allclose(distances[9, 1:], 2**0.5)
    alive = np.delete(index, [0, 9], axis=0)
    assert not np.isin(alive, [0, 9]).any()
    with pytest.raises(ValueError, match="k must be less than the number of samples whose loss varies, 34"):
        interop.knn(kernel, 34)


def test_hdbscan(kernel: lossk.LossKernel) -> None:
    settings: dict[str, Any] = {"min_cluster_size": 5, "metric": "precomputed", "copy": True}
    labels = HDBSCAN(**settings).fit_predict(interop.distance(kernel).astype(np.float64))
    assert len({(c, y) for c, y in zip(labels, LABELS, strict=True) if c >= 0}) == GROUPS
    graph = interop.neighbor_graph(kernel, 30).astype(np.float64)
    sparse = HDBSCAN(**settings).fit_predict(graph.maximum(graph.T))
    assert np.array_equal(labels, sparse)
