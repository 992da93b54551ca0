"""The loss kernel in scikit-learn, and as neighbor graphs for umap-learn, TorchDR and HDBSCAN.

    SpectralClustering(affinity="precomputed").fit(affinity(kernel))
    KernelPCA(kernel="precomputed").fit(gram(kernel));  SVC(kernel="precomputed").fit(gram(kernel), labels)
    NearestNeighbors(metric="precomputed").fit(neighbor_graph(kernel, 15))
    make_pipeline(LossKernelTransformer(), SVC(kernel="precomputed")).fit(losses(traces), labels)

gram, affinity and distance are N x N and refuse what does not fit; neighbor_graph and knn stream over tiles.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import scipy.sparse
from torch import Tensor

from lossk.checks import check_choice, check_flag, check_instance, check_integer, check_tensor, shown
from lossk.forms.blocks import tile_spans
from lossk.forms.centering import degrees_of_freedom
from lossk.kernel.kernel import LossKernel
from lossk.kernel.traces import LossTraces
from lossk.optional import require

require("sklearn", "sklearn", package="scikit-learn")

from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin  # noqa: E402
from sklearn.utils.validation import check_is_fitted, validate_data  # noqa: E402


def gram(kernel: LossKernel, *, correlation: bool = True) -> np.ndarray:
    """The kernel as a positive semi-definite matrix for `kernel="precomputed"`: [N, N] float32.

    Args:
        correlation: R, in which every sample counts alike; False is K, nats^2, in which those of large variance do.

    Raises:
        MemoryError: it does not fit.
    """
    return _symmetric(kernel, check_flag("correlation", correlation))


def affinity(kernel: LossKernel) -> np.ndarray:
    """max(R, 0), for `affinity="precomputed"` in spectral clustering: [N, N] float32 in [0, 1].

    Losses that move against each other are as unrelated, in it, as losses that move independently.
    """
    similarity = _symmetric(kernel, correlation=True)
    return np.maximum(similarity, 0.0, out=similarity)


def distance(kernel: LossKernel) -> np.ndarray:
    """sqrt(2 (1 - R)) for `metric="precomputed"`: [N, N] float32 in [0, 2], exactly 0 on the diagonal, symmetric."""
    matrix = _symmetric(kernel, correlation=True)
    np.subtract(1.0, matrix, out=matrix)
    np.sqrt(np.maximum(2.0 * matrix, 0.0, out=matrix), out=matrix)
    np.fill_diagonal(matrix, 0.0)
    return matrix


def _symmetric(kernel: LossKernel, correlation: bool) -> np.ndarray:
    """The matrix, symmetric to the last bit, as HDBSCAN insists: within a diagonal tile a product may not be."""
    matrix = check_instance("kernel", kernel, LossKernel).to_numpy(correlation=correlation)
    for span in tile_spans(len(kernel), kernel.tile):
        upper = np.triu(matrix[span, span])
        matrix[span, span] = upper + np.triu(upper, 1).T
    return matrix


def knn(kernel: LossKernel, k: int = 15) -> tuple[np.ndarray, np.ndarray]:
    """The k + 1 nearest samples of each, itself first: (index [N, k + 1] int64, distance [N, k + 1] float32).

    As `umap.UMAP(n_neighbors=k + 1, precomputed_knn=knn(kernel, k))` wants them. Distances ascend along a row. A sample
    whose loss never varies is at distance sqrt(2) of every other (R = 0); it is given the first k of them, and is
    nobody's neighbor.

    Raises:
        ValueError: k is not from 1 to N - 1, or fewer than k other samples vary.
    """
    found = check_instance("kernel", kernel, LossKernel).neighbors(k)
    index, correlation = found.index.numpy(), found.correlation.numpy().copy()
    dead, n = kernel.dead.numpy(), len(kernel)
    if (index[~dead] < 0).any():
        raise ValueError(f"k must be less than the number of samples whose loss varies, {int((~dead).sum())}, got {k}")
    for row in np.flatnonzero(dead):
        index[row] = [other for other in range(min(k + 1, n)) if other != row][:k]
        correlation[row] = 0.0
    away = np.sqrt(np.maximum(2.0 - 2.0 * correlation, 0.0))
    own = np.arange(n, dtype=index.dtype)[:, None]
    return np.concatenate([own, index], axis=1), np.concatenate([np.zeros((n, 1), away.dtype), away], axis=1)


def neighbor_graph(
    kernel: LossKernel, k: int = 15, *, mode: Literal["distance", "connectivity"] = "distance"
) -> scipy.sparse.csr_matrix:
    """Sparse graph of the k nearest neighbors, as `sklearn.neighbors.KNeighborsTransformer` makes it: CSR [N, N].

    Each row holds k + 1 entries by ascending distance, the sample itself among them, at distance 0 (an explicit zero),
    so that estimators with `n_neighbors=k` and `metric="precomputed"` take it, and so does `sklearn.cluster.HDBSCAN`
    if it is made symmetric (`graph.maximum(graph.T)`) and is connected.

    Args:
        k: neighbors besides the sample itself.
        mode: "distance", sqrt(2 (1 - R)), or "connectivity", ones.
    """
    mode = check_choice("mode", mode, ("distance", "connectivity"))
    index, away = knn(kernel, k)
    data = away if mode == "distance" else np.ones_like(away)
    starts = np.arange(0, index.size + 1, k + 1)
    return scipy.sparse.csr_matrix((data.ravel(), index.ravel(), starts), shape=(len(kernel), len(kernel)))


def losses(traces: LossTraces) -> np.ndarray:
    """Traces as scikit-learn's X: a sample per row, its losses at all draws as features: [N, C T] float32, nats."""
    traces = check_instance("traces", traces, LossTraces)
    return traces.losses.reshape(-1, traces.num_samples).T.numpy()


def _as_features(X: Any) -> Any:
    """What scikit-learn's own checks would fail on without the argument's name; the rest is left to them."""
    if isinstance(X, str | bytes | bytearray | dict | set | type) or X is None or getattr(X, "ndim", 1) == 0:
        raise TypeError(f"X must be an array of losses [n, draws], got {shown(X)}")
    if not hasattr(X, "shape") or isinstance(X, Tensor):
        return check_tensor(
            "X", X, finite=False
        ).numpy()  # NaN is scikit-learn's to refuse, in the words its checks know
    return X


class LossKernelTransformer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Losses of samples at common draws [n, draws] to the loss kernel, for pipelines and cross-validation.

    Each row is centered (within each chain) and scaled by itself, so that nothing of the samples held out is known to
    those fitted.

    Args:
        output: "kernel", [n, fitted samples], for estimators with `kernel="precomputed"`; or "features", [n, draws],
            whose inner products are the kernel, for any estimator and without an n x n matrix.
        correlation: R instead of K; where a loss never varies its row is 0 (also against itself).
        num_chains: consecutive equal parts of the features, each centered about its own mean.

    Attributes:
        features_: [fitted samples, draws] float32 or float64, as `X` was; of output="kernel".
    """

    def __init__(self, *, output: str = "kernel", correlation: bool = True, num_chains: int = 1) -> None:
        self.output = output
        self.correlation = correlation
        self.num_chains = num_chains

    def fit(self, X: Any, y: Any = None) -> LossKernelTransformer:
        """Remember the samples that rows are compared with. X: [n, draws] losses; y is not looked at."""
        check_choice("output", self.output, ("kernel", "features"))
        check_flag("correlation", self.correlation)
        num_chains = check_integer("num_chains", self.num_chains, 1)
        X = self._checked(X, ensure_min_features=2)
        if X.shape[1] % num_chains or X.shape[1] < 2 * num_chains:
            raise ValueError(
                f"num_chains must divide the number of draws, {X.shape[1]}, at least 2 to each, got {num_chains}"
            )
        self.features_ = self._features(X)
        self._n_features_out = len(X) if self.output == "kernel" else X.shape[1]
        return self

    def transform(self, X: Any) -> np.ndarray:
        """[n, fitted samples] or [n, draws]. X: [n, draws] losses at the same draws as those fitted."""
        check_is_fitted(self)
        X = self._checked(X, reset=False)
        features = self._features(X)
        return features @ self.features_.T if self.output == "kernel" else features

    def _checked(self, X: Any, **rules: Any) -> np.ndarray:
        """By scikit-learn's own checks, in their words."""
        X = _as_features(X)
        try:
            return validate_data(self, X, dtype=(np.float64, np.float32), **rules)
        except (ValueError, TypeError) as error:
            raise type(error)(f"X: {error}") from error

    def _features(self, X: np.ndarray) -> np.ndarray:
        """Rows whose inner products are the kernel, in X's precision."""
        wide = X.astype(np.float64)
        chains = wide.reshape(len(X), self.num_chains, -1)
        deviations = (chains - chains.mean(axis=2, keepdims=True)).reshape(X.shape)
        freedom = degrees_of_freedom(self.num_chains, chains.shape[2], "chain")
        constant = (chains == chains[:, :, :1]).all(axis=(1, 2))  # exactly, where the mean would round
        deviations[constant] = 0.0
        if not self.correlation:
            return (deviations / freedom**0.5).astype(X.dtype)
        norms = np.linalg.norm(deviations, axis=1, keepdims=True)
        return np.divide(deviations, norms, out=np.zeros_like(deviations), where=norms > 0).astype(X.dtype)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags
