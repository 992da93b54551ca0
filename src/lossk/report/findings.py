"""What a report shows, computed from a kernel: neighbors, map, clusters, matrix, spectrum, classes.

Everything that touches pairs of samples streams over tiles; nothing here is N x N.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tqdm.auto import tqdm

from lossk.analysis.hierarchy import class_similarity, dendrogram
from lossk.analysis.maps import KernelMap, cluster, map_kernel
from lossk.analysis.neighbors import SignificantNeighbors, significant_neighbors
from lossk.analysis.spectrum import Spectrum, spectrum
from lossk.kernel.kernel import LossKernel
from lossk.kernel.neighbors import Neighbors
from lossk.kernel.read_memory import check_report
from lossk.report.matrix import MOST_BINS, binned_correlation, sorted_samples
from lossk.report.samples import Samples

MAP_NEIGHBORS = 30  # that the map is drawn from; the first of them are shown
NEAR, FAR = 12, 4  # neighbors shown for each sample: most correlated, most anti-correlated
LISTED = 16  # samples in each list
EIGENPAIRS = 32
FEW_EIGENPAIRS, MANY_TILES = 8, 20_000  # of a kernel in tiles, each product reads them all: some 40 instead of 130
EIGENROWS, HEAVY = 8, 6  # eigenvectors in the table, and the samples shown of each
MOST_SAMPLES = 100_000
STEPS = ("neighbors", "opposites", "map", "clusters", "matrix", "spectrum", "classes")


@dataclass(frozen=True, kw_only=True)
class ClassMeans:
    """Mean correlations of pairs of classes with live samples, and their tree."""

    labels: list[int]  # the classes, in the tree's order
    means: np.ndarray  # [c, c] float64, over pairs i != j; NaN on the diagonal of a class of one
    image_error: np.ndarray | None  # [c, c], had other images of the same classes been drawn
    chain_error: np.ndarray | None  # [c, c], had the chains been others; of a kernel in factor form
    segments: list[dict[str, list[float]]]  # of the dendrogram: x = distance, y = place (10 i + 5 of leaf i)


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All of it."""

    near: SignificantNeighbors  # [N, k]
    far: SignificantNeighbors
    coordinates: np.ndarray  # [N, 2] float32, NaN for dead samples
    clusters: np.ndarray  # [N] int64, -1 = in none
    order: np.ndarray  # [n] int64: live samples as the matrix has them
    matrix: np.ndarray  # [M, M] float32
    spectrum: Spectrum
    classes: ClassMeans | None
    influential: np.ndarray  # [LISTED] int64, largest self-covariance first
    suspicious: np.ndarray | None  # [LISTED] int64; None without labels
    disagreement: np.ndarray | None  # [N] float64, share of a sample's significant neighbors of another label

    def listed(self) -> np.ndarray:
        """Samples that the page's lists name: [n] int64, ascending."""
        heavy = np.argsort(-np.abs(self.spectrum.eigenvectors[:, :EIGENROWS].numpy()), axis=0)[:HEAVY].ravel()
        parts = [self.influential, heavy, *([] if self.suspicious is None else [self.suspicious])]
        return np.unique(np.concatenate(parts))


def find(kernel: LossKernel, samples: Samples, *, seed: int = 0, progress: bool = True) -> Findings:
    """Compute what a report shows; a progress bar names the step.

    Raises:
        ValueError: more than 100,000 samples, or fewer than 4 that vary.
    """
    check_size(kernel)
    n = kernel.num_samples
    with tqdm(total=len(STEPS), disable=not progress, unit="step", leave=False) as bar:

        def step(name: str) -> None:
            bar.set_description(name)
            bar.update(int(name != STEPS[0]))

        step("neighbors")
        near = significant_neighbors(kernel, min(MAP_NEIGHBORS, n - 1))
        step("opposites")
        far = significant_neighbors(kernel, min(FAR, n - 1), anti=True)
        step("map")
        found = map_kernel(
            kernel,
            num_neighbors=near.index.shape[1],
            seed=seed,
            neighbors=Neighbors(near.index, near.correlation, near.noise_floor),
        )
        step("clusters")
        clusters = cluster(found, min_cluster_size=cluster_size(n)).labels.numpy()
        step("matrix")
        order = sorted_samples(kernel.dead.numpy(), samples.labels, clusters, _along(found))
        matrix = binned_correlation(kernel, order, min(MOST_BINS, len(order)))
        step("spectrum")
        leading = spectrum(kernel, eigenpairs(kernel))
        step("classes")
        classes = None if samples.labels is None else class_means(kernel, samples.labels)
        bar.update(1)
    disagreement = None if samples.labels is None else disagree(near, samples.labels)
    return Findings(
        near=near,
        far=far,
        coordinates=found.coordinates.numpy(),
        clusters=clusters,
        order=order,
        matrix=matrix,
        spectrum=leading,
        classes=classes,
        influential=_largest(kernel.variance.numpy()),
        suspicious=None if disagreement is None else suspects(disagreement, kernel.mean_loss.numpy()),
        disagreement=disagreement,
    )


def check_size(kernel: LossKernel) -> None:
    """Refuse what a page cannot show."""
    alive = int((~kernel.dead).sum())
    if kernel.num_samples > MOST_SAMPLES:
        raise ValueError(
            f"a report takes at most {MOST_SAMPLES:,} samples, got {kernel.num_samples:,}; make it of a smaller kernel"
        )
    if alive < 4:
        raise ValueError(f"a report needs at least 4 samples whose loss varies, got {alive} of {kernel.num_samples}")


def check_memory(kernel: LossKernel, samples: Samples) -> None:
    """Refuse, with the sizes, what would not fit into free memory."""
    classes = 0 if samples.labels is None else len(np.unique(samples.labels))
    draws = kernel.num_chains * kernel.num_draws if kernel.form == "factor" else 0
    check_report(kernel.num_samples, kernel.tile, draws, min(MOST_BINS, kernel.num_samples), classes)


def cluster_size(num_samples: int) -> int:
    """The fewest samples that make a cluster: 1 %, at least 5."""
    return max(num_samples // 100, 5)


def eigenpairs(kernel: LossKernel) -> int:
    """How many leading eigenpairs are worth their cost."""
    most = FEW_EIGENPAIRS if kernel.form == "tiles" and kernel.num_samples > MANY_TILES else EIGENPAIRS
    return min(most, kernel.num_samples)


def disagree(near: SignificantNeighbors, labels: np.ndarray) -> np.ndarray:
    """Share of each sample's significant neighbors (among the most correlated) that carry another label: [N].

    NaN where a sample has none.
    """
    index, counts = near.index.numpy(), near.significant.numpy()
    other = (labels[np.maximum(index, 0)] != labels[:, None]) & counts
    total = counts.sum(axis=1)
    return np.where(total > 0, other.sum(axis=1) / np.maximum(total, 1), np.nan)


def suspects(disagreement: np.ndarray, mean_loss: np.ndarray) -> np.ndarray:
    """Samples whose label their neighbors contradict: by the share that does, then by mean loss. [LISTED] int64."""
    share = np.nan_to_num(disagreement, nan=-1.0)
    return np.lexsort((-mean_loss, -share))[:LISTED]


def _largest(values: np.ndarray) -> np.ndarray:
    return np.argsort(-values, kind="stable")[:LISTED]


def _along(found: KernelMap) -> np.ndarray:
    """One number per sample that puts neighbors on the map near each other: its place along the map's long axis."""
    points = found.coordinates.double().numpy()
    centered = points - np.nanmean(points, axis=0)
    live = centered[np.isfinite(centered).all(axis=1)]
    return centered @ np.linalg.svd(live, full_matrices=False)[2][0]


def class_means(kernel: LossKernel, labels: np.ndarray) -> ClassMeans | None:
    """`lossk.analysis.hierarchy` of the classes that have live samples; None of fewer than three."""
    from scipy.cluster import hierarchy as scipy_hierarchy

    alive = ~kernel.dead.numpy()
    names = np.unique(labels[alive])
    if len(names) < 3:
        return None
    where = np.where(alive, np.searchsorted(names, labels), 0)  # dead samples are left out, whatever their label
    texts = [str(name) for name in names]
    signed = class_similarity(kernel, where, texts).signed
    tree = scipy_hierarchy.dendrogram(dendrogram(signed, texts).linkage, no_plot=True)
    leaves = tree["leaves"]

    def in_order(matrix: np.ndarray | None) -> np.ndarray | None:
        return None if matrix is None else matrix[np.ix_(leaves, leaves)]

    return ClassMeans(
        labels=names[leaves].tolist(),
        means=signed.matrix[np.ix_(leaves, leaves)],
        image_error=in_order(signed.image_error),
        chain_error=in_order(signed.chain_error),
        segments=[{"x": list(d), "y": list(i)} for d, i in zip(tree["dcoord"], tree["icoord"], strict=True)],
    )
