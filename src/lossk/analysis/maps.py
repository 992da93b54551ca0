"""Map of a kernel: UMAP (McInnes, Healy, Melville, arXiv 1802.03426) of its nearest neighbors, and clusters on it.

What is drawn is the graph of nearest neighbors in d = sqrt(2 (1 - R)), found by streaming over tiles; no N x N array
is formed. UMAP keeps neighborhoods, not distances: which samples lie side by side means something; how far apart two
groups lie, or how large one is, does not.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lossk.analysis.inputs import check_kernel, check_labels, check_neighbors, check_seed
from lossk.checks import check_integer, check_number, check_optional, check_tensor
from lossk.optional import check_installed
from lossk.records import check_record

if TYPE_CHECKING:
    from lossk.kernel.kernel import LossKernel
    from lossk.kernel.neighbors import Neighbors

PROJECTIONS = 16  # random directions that say where the disconnected parts of a graph lie


@dataclass(frozen=True)
class KernelMap:
    """A map and the neighbors it was drawn from."""

    coordinates: Tensor  # [N, dimensions] float32; NaN for dead samples
    index: Tensor  # [N, k] int64, other samples, nearest first; -1 where there is none
    distance: Tensor  # [N, k] float32, sqrt(2 (1 - R)); NaN where there is none
    dead: Tensor  # [N] bool: samples whose loss never varied, which have no place on the map

    def __post_init__(self) -> None:
        check_record(self)


def map_kernel(
    kernel: LossKernel,
    *,
    dimensions: int = 2,
    num_neighbors: int = 30,
    min_dist: float = 0.1,
    seed: int = 0,
    neighbors: Neighbors | None = None,
) -> KernelMap:
    """Place each live sample so that its nearest neighbors in the kernel lie near it. Needs lossk[analysis].

    The same seed gives the same map (on one machine: UMAP's floating point is the processor's). Time: the streamed
    search of neighbors and one product of the kernel with 16 vectors, each N^2 / 2 pairs, then UMAP on one thread, of
    order N k. Memory beyond the kernel's own: of order N k.

    Args:
        dimensions: 2 or 3, say; from 1 to 10.
        num_neighbors: other samples that each is joined to; fewer show detail, more show the whole. At most two less
            than the live samples are used.
        min_dist: how tightly points may be packed, from 0 to 1.
        neighbors: `kernel.neighbors(k)` of all samples, if it is at hand, with k at least `num_neighbors`.

    Raises:
        ValueError: a bad argument, or fewer live samples than a map needs (dimensions + 2, and 4).
    """
    kernel = check_kernel("kernel", kernel)
    dimensions = check_integer("dimensions", dimensions, 1)
    num_neighbors = check_integer("num_neighbors", num_neighbors, 2)
    seed = check_seed(seed)
    min_dist = check_number("min_dist", min_dist, "a number from 0 to 1", least=0.0)
    if dimensions > 10 or min_dist > 1:
        raise ValueError(f"dimensions must be at most 10 and min_dist at most 1, got {dimensions} and {min_dist}")
    alive = (~kernel.dead).nonzero().squeeze(1)
    fewest = max(dimensions + 2, 4)
    if len(alive) < fewest:
        raise ValueError(
            f"a map of dimensions={dimensions} needs at least {fewest} live samples, got {len(alive)} "
            f"({kernel.num_samples} in all, {int(kernel.dead.sum())} whose loss never varied)"
        )
    check_installed("umap", "analysis", "a map", package="umap-learn")
    k = min(num_neighbors, len(alive) - 2)  # UMAP counts a sample among its own, and wants fewer than there are
    found = kernel.neighbors(k) if neighbors is None else _cut(neighbors, kernel.num_samples, k)
    distance = (2.0 * (1.0 - found.correlation)).clamp(min=0.0).sqrt().masked_fill(found.index < 0, float("nan"))
    place = torch.full((kernel.num_samples,), -1, dtype=torch.int64, device="cpu")
    place[alive] = torch.arange(len(alive), device="cpu")  # samples are numbered anew without the dead ones
    points = _umap(
        place[found.index[alive]].numpy(),
        distance[alive].numpy(),
        _outline(kernel, alive, seed),
        dimensions=dimensions,
        min_dist=min_dist,
        seed=seed,
    )
    coordinates = torch.full((kernel.num_samples, dimensions), float("nan"), dtype=torch.float32, device="cpu")
    coordinates[alive] = torch.from_numpy(points)
    return KernelMap(coordinates, found.index, distance, kernel.dead)


def _cut(neighbors: Neighbors, num_samples: int, k: int) -> Neighbors:
    neighbors = check_neighbors("neighbors", neighbors, num_samples, k)
    return neighbors._replace(index=neighbors.index[:, :k], correlation=neighbors.correlation[:, :k])


def _outline(kernel: LossKernel, alive: Tensor, seed: int) -> np.ndarray:
    """Rows of R in a few random directions, of unit length: [n, 16] float32.

    UMAP starts the connected parts of a graph where the means of these lie; within a part only the graph counts.
    """
    directions = np.random.default_rng(np.random.SeedSequence(seed)).standard_normal((len(alive), PROJECTIONS))
    gain = kernel.variance[alive].rsqrt().unsqueeze(1)
    vectors = torch.zeros(kernel.num_samples, PROJECTIONS, dtype=torch.float64, device="cpu")
    vectors[alive] = gain * torch.from_numpy(directions)
    rows = gain * kernel.matvec(vectors)[alive]
    return (rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-300)).float().numpy()


def _umap(
    index: np.ndarray, distance: np.ndarray, outline: np.ndarray, *, dimensions: int, min_dist: float, seed: int
) -> np.ndarray:
    """[n, dimensions] float32 from the neighbors of n samples, which UMAP wants to start with the sample itself."""
    count = len(index)
    own = np.arange(count)[:, None]
    index = np.hstack([own, index]).astype(np.int64)
    distance = np.hstack([np.zeros_like(own), distance]).astype(np.float32)
    with _quiet():
        from umap import UMAP

        umap = UMAP(
            n_components=dimensions,
            n_neighbors=index.shape[1],
            min_dist=min_dist,
            random_state=seed,
            n_jobs=1,  # with a seed UMAP uses one thread anyway
            # The spectral start solves for dimensions + 1 eigenvectors, which so few points do not have.
            init="spectral" if count > 3 * (dimensions + 1) else "random",
            precomputed_knn=(index, distance),
        )
        points = umap.fit_transform(outline)
    return np.ascontiguousarray(points, dtype=np.float32)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without UMAP's remarks on what is meant here: neighbors that it did not search for itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "precomputed_knn", UserWarning)
        warnings.filterwarnings("ignore", "Tensorflow not installed", ImportWarning)
        yield


@dataclass(frozen=True)
class Clusters:
    """Groups of samples on a map."""

    labels: Tensor  # [N] int64, from 0; -1 = in no cluster, or dead
    probability: Tensor  # [N] float64: strength of membership in [0, 1]; 0 where the label is -1
    composition: Tensor | None  # [clusters + 1, classes] int64: samples of each class; the last row is label -1
    classes: Tensor | None  # [classes] int64: which class labels the columns are

    def __post_init__(self) -> None:
        check_record(self)

    @property
    def num_clusters(self) -> int:
        """Clusters, noise aside."""
        return int(self.labels.max()) + 1 if len(self.labels) else 0


def cluster(
    map_or_coordinates: KernelMap | Tensor | np.ndarray,
    *,
    min_cluster_size: int = 15,
    min_samples: int | None = None,
    labels: Tensor | None = None,
) -> Clusters:
    """HDBSCAN (Campello, Moulavi, Sander 2013; scikit-learn's) on a map's coordinates. Needs lossk[analysis].

    These are clusters of the picture: UMAP pulls neighbors together and may tear what is continuous, so a cluster is a
    proposal to look at; how its members correlate is in the kernel.

    Args:
        map_or_coordinates: a `KernelMap`, or [N, d] coordinates, with NaN rows for samples that are nowhere.
        min_cluster_size: the fewest samples that make a cluster.
        min_samples: neighbors that make a point dense; None = `min_cluster_size`.
        labels: [N] integer classes, for the composition of each cluster.
    """
    min_cluster_size = check_integer("min_cluster_size", min_cluster_size, 2)
    min_samples = check_optional(check_integer, "min_samples", min_samples, 1)
    given = map_or_coordinates.coordinates if isinstance(map_or_coordinates, KernelMap) else map_or_coordinates
    coordinates = check_tensor("map_or_coordinates", given, ("N", "d"), finite=False).cpu()
    labels = check_optional(check_labels, "labels", labels, len(coordinates))
    placed = torch.isfinite(coordinates).all(dim=1)
    found = torch.full((len(coordinates),), -1, dtype=torch.int64, device="cpu")
    probability = torch.zeros(len(coordinates), dtype=torch.float64, device="cpu")
    if int(placed.sum()) >= max(min_cluster_size, min_samples or 1, 2):
        result = _hdbscan(coordinates[placed].double().numpy(), min_cluster_size, min_samples)
        found[placed] = torch.from_numpy(result.labels_.astype(np.int64))
        probability[placed] = torch.from_numpy(np.asarray(result.probabilities_, dtype=np.float64))
    composition = None if labels is None else _composition(found, labels)
    return Clusters(found, probability, *(composition or (None, None)))


def _hdbscan(points: np.ndarray, min_cluster_size: int, min_samples: int | None) -> Any:
    check_installed("sklearn", "analysis", "clusters", package="scikit-learn")
    from sklearn.cluster import HDBSCAN

    return HDBSCAN(min_cluster_size=min_cluster_size, min_samples=min_samples, copy=True).fit(points)


def _composition(found: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """[clusters + 1, classes] counts, the last row of what is in no cluster, and the classes [classes]."""
    classes, column = labels.long().unique(return_inverse=True)
    count = int(found.max()) + 1
    row = torch.where(found < 0, count, found)
    table = torch.zeros(count + 1, len(classes), dtype=torch.int64, device="cpu")
    table.index_put_((row, column), torch.ones_like(row), accumulate=True)
    return table, classes
