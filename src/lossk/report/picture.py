"""One picture of a kernel: its correlation matrix sorted by class, a map, and images beside their neighbors.

`draw_picture` takes what is drawn out of a kernel; `draw` draws arrays and knows no kernel.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lossk.kernel.card import color_limit

if TYPE_CHECKING:
    from lossk.kernel.kernel import LossKernel
    from lossk.kernel.neighbors import Neighbors

MOST_SAMPLES = 3000  # in the matrix and the map; more are thinned, the same share of every class
NUM_QUERIES, NUM_NEIGHBORS = 8, 6
LINE = 205  # characters of the usual size beneath the title
# Okabe and Ito's eight colors, which color-blind readers can tell apart, and two more that keep clear of them.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C6D31", "#6A3D9A", "#000000", "#A6A600")
SAME, OTHER = "#0072B2", "#D55E00"


@dataclass(frozen=True)
class Pictured:
    """What a picture shows beside the kernel itself."""

    labels: Tensor  # [N] int64
    class_names: Sequence[str]
    images: Tensor | None  # [N, H, W] float32 in [0, 1]
    title: str
    subtitle: str


@dataclass(frozen=True, kw_only=True)
class PictureData:
    """All that is drawn, as arrays. M of the N samples are in the matrix and on the map, sorted by class."""

    title: str
    subtitle: str
    num_samples: int
    correlation: np.ndarray  # [M, M] float32, sorted by class
    labels: np.ndarray  # [M] int, ascending
    map_points: np.ndarray  # [M, 2]
    class_names: Sequence[str]
    images: np.ndarray  # [N, H, W] in [0, 1]
    image_labels: np.ndarray  # [N] int
    queries: np.ndarray  # [q] int, rows of images
    query_notes: Sequence[str]  # [q], beside each query
    neighbors: np.ndarray  # [q, k] int, -1 where there is none
    neighbor_correlation: np.ndarray  # [q, k]
    noise_floor: np.ndarray  # [q]


def draw_picture(kernel: LossKernel, what: Pictured, path: Path, *, neighbors: Neighbors, seed: int = 0) -> None:
    """Write the picture of a kernel as a PNG. Needs scikit-learn and matplotlib.

    Costs one M x M correlation block (M at most 3,000) and a t-SNE of it, some seconds. Without images the grid of
    neighbors stays empty.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(picture_data(kernel, what, neighbors, seed), path)


def picture_data(kernel: LossKernel, what: Pictured, neighbors: Neighbors, seed: int = 0) -> PictureData:
    """Gather what `draw` needs."""
    labels, index = what.labels.numpy(), neighbors.index.numpy()
    rows = thin(labels, MOST_SAMPLES, seed)
    rows = rows[np.argsort(labels[rows], kind="stable")]
    correlation = kernel.correlation(torch.from_numpy(rows), torch.from_numpy(rows)).numpy()
    if what.images is None:
        queries, notes = np.zeros(0, dtype=np.int64), list[str]()
    else:
        queries, notes = choose_queries(kernel.variance.numpy(), labels, index, what.class_names, seed)
    shown = min(NUM_NEIGHBORS, index.shape[1])
    return PictureData(
        title=what.title,
        subtitle=what.subtitle,
        num_samples=kernel.num_samples,
        correlation=correlation,
        labels=labels[rows],
        map_points=embed(correlation, seed),
        class_names=what.class_names,
        images=np.zeros((0, 1, 1)) if what.images is None else what.images.numpy(),
        image_labels=labels,
        queries=queries,
        query_notes=notes,
        neighbors=index[queries, :shown],
        neighbor_correlation=neighbors.correlation.numpy()[queries, :shown],
        noise_floor=neighbors.noise_floor.numpy()[queries],
    )


def thin(labels: np.ndarray, most: int, seed: int) -> np.ndarray:
    """At most `most` row numbers, the same share of every class: [M] int, ascending."""
    if len(labels) <= most:
        return np.arange(len(labels))
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    kept = []
    for label in np.unique(labels):
        of_class = np.flatnonzero(labels == label)
        count = max(1, int(len(of_class) * most / len(labels)))
        kept.append(rng.choice(of_class, size=count, replace=False))
    return np.sort(np.concatenate(kept))


def choose_queries(
    variance: np.ndarray, labels: np.ndarray, neighbors: np.ndarray, class_names: Sequence[str], seed: int
) -> tuple[np.ndarray, list[str]]:
    """Half the queries: the largest self-covariances; the rest: ordinary samples, one from each of other classes."""
    largest = np.argsort(-variance, kind="stable")[: NUM_QUERIES // 2]
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    classes = [label for label in np.unique(labels) if label not in labels[largest]] or list(np.unique(labels))
    ordinary = []
    for label in rng.permutation(classes)[: NUM_QUERIES - len(largest)]:
        of_class = np.flatnonzero((labels == label) & (neighbors[:, 0] >= 0))
        if len(of_class):
            ordinary.append(of_class[np.argsort(variance[of_class], kind="stable")[len(of_class) // 2]])
    queries = np.concatenate([largest, np.array(ordinary, dtype=largest.dtype)])
    kinds = ["largest\nvariance"] * len(largest) + ["median\nof class"] * len(ordinary)
    names = [_name(class_names, label) for label in labels[queries]]
    return queries, [f"{name}\n{kind}" for name, kind in zip(names, kinds, strict=True)]


def embed(correlation: np.ndarray, seed: int) -> np.ndarray:
    """A 2-D map [M, 2] of the distances sqrt(2 (1 - R)): t-SNE (van der Maaten and Hinton 2008), started from PCA."""
    from sklearn.manifold import TSNE

    distance = np.sqrt(np.clip(2.0 * (1.0 - correlation), 0.0, None))
    np.fill_diagonal(distance, 0.0)
    # Principal coordinates keep the large-scale arrangement, which a random start would not.
    square = distance.astype(np.float64) ** 2
    centered = -0.5 * (square - square.mean(axis=0) - square.mean(axis=1)[:, None] + square.mean())
    start = _leading(centered, seed)
    start *= 1e-4 / max(float(start[:, 0].std()), 1e-30)
    perplexity = min(30.0, (len(distance) - 1) / 3)
    tsne = TSNE(metric="precomputed", init=start.astype(np.float32), perplexity=perplexity, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return tsne.fit_transform(distance)


def _leading(matrix: np.ndarray, seed: int) -> np.ndarray:
    """Two leading eigenvectors of a symmetric matrix, times the roots of their eigenvalues: [M, 2]."""
    vectors = np.random.default_rng(np.random.SeedSequence(seed)).standard_normal((len(matrix), 6))
    for _ in range(30):  # subspace iteration: six vectors make the first two converge fast enough for a start
        vectors = np.linalg.qr(matrix @ vectors)[0]
    values, rotation = np.linalg.eigh(vectors.T @ matrix @ vectors)
    top = np.argsort(-values)[:2]
    return (vectors @ rotation[:, top]) * np.sqrt(np.clip(values[top], 1e-30, None))


def draw(data: PictureData, path: Path) -> None:
    """Draw and write a PNG, 16 x 7.8 inches at 150 dots per inch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 7.8), dpi=150, facecolor="white")  # not pyplot: no global state, no display
    FigureCanvasAgg(figure)
    figure.text(0.02, 0.952, data.title, fontsize=19, fontweight="bold", va="center")
    size = min(11.5, 11.5 * LINE / max(len(data.subtitle), 1))
    figure.text(0.02, 0.9, data.subtitle, fontsize=size, color="0.3", va="center")
    thinned = "" if len(data.labels) == data.num_samples else f" ({len(data.labels):,} of {data.num_samples:,})"
    _matrix(figure, data, thinned)
    _map(figure, data, thinned)
    if len(data.queries):
        _neighbors(figure, data)
    figure.savefig(path)


def _matrix(figure: Any, data: PictureData, thinned: str) -> None:
    axes = figure.add_axes((0.06, 0.165, 0.325, 0.6667))
    limit = color_limit(data.correlation)
    image = axes.imshow(data.correlation, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="antialiased")
    edges = np.flatnonzero(np.diff(data.labels)) + 0.5
    for edge in edges:
        axes.axhline(edge, color="black", linewidth=0.4, alpha=0.6)
        axes.axvline(edge, color="black", linewidth=0.4, alpha=0.6)
    bounds = np.concatenate([[-0.5], edges, [len(data.labels) - 0.5]])
    present = [_name(data.class_names, label) for label in np.unique(data.labels)]
    for set_ticks in (axes.set_xticks, axes.set_yticks):
        set_ticks((bounds[1:] + bounds[:-1]) / 2, present, fontsize=10)
    if max(map(len, present)) > 3:
        for text in axes.get_xticklabels():
            text.set(rotation=25, ha="right", rotation_mode="anchor", fontsize=8.5)
        axes.tick_params(axis="y", labelsize=8.5)
    axes.tick_params(length=0)
    axes.set_title(f"Correlation of losses, sorted by class{thinned}", fontsize=12, loc="left")
    bar = figure.colorbar(image, cax=figure.add_axes((0.06, 0.072, 0.325, 0.018)), orientation="horizontal",
                          extend="both")  # fmt: skip
    bar.set_label("correlation R (colors saturate beyond the ends)", fontsize=9.5)
    bar.ax.tick_params(labelsize=9)


def _map(figure: Any, data: PictureData, thinned: str) -> None:
    from matplotlib import patheffects

    axes = figure.add_axes((0.4, 0.165, 0.275, 0.6667))
    classes = np.unique(data.labels)
    for position, label in enumerate(classes):
        points, color = data.map_points[data.labels == label], COLORS[position % len(COLORS)]
        axes.scatter(*points.T, s=7, color=color, linewidths=0, alpha=0.75, label=_name(data.class_names, label))
    for label in classes:
        x, y = np.median(data.map_points[data.labels == label], axis=0)
        axes.text(x, y, _name(data.class_names, label), fontsize=13, fontweight="bold", ha="center", va="center",
                  path_effects=[patheffects.withStroke(linewidth=4, foreground="white")])  # fmt: skip
    axes.set(xticks=[], yticks=[])
    axes.set_title(f"Map (t-SNE of distances $\\sqrt{{2(1-R)}}$){thinned}", fontsize=12, loc="left")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.03), ncol=min(5, len(classes)), fontsize=9, frameon=False,
                markerscale=2.2, handletextpad=0.2, columnspacing=1.1)  # fmt: skip


def _neighbors(figure: Any, data: PictureData) -> None:
    rows, columns = data.neighbors.shape
    left, right, top, bottom = 0.745, 0.992, 0.835, 0.095
    width, height = (right - left) / (columns + 1.25), (top - bottom) / rows
    figure.text(0.69, 0.848, "Images and their nearest neighbors", fontsize=12)
    for row, query in enumerate(data.queries):
        y = top - (row + 1) * height
        figure.text(left - 0.003, y + 0.6 * height, data.query_notes[row], fontsize=8.5, ha="right", va="center",
                    linespacing=1.15)  # fmt: skip
        _thumbnail(figure, (left, y, width, height), data.images[query], frame="black", text="", faded=False)
        for column, other in enumerate(data.neighbors[row]):
            if other < 0:
                continue
            correlation = data.neighbor_correlation[row, column]
            same = data.image_labels[other] == data.image_labels[query]
            _thumbnail(
                figure,
                (left + (column + 1.25) * width, y, width, height),
                data.images[other],
                frame=SAME if same else OTHER,
                text=f"{correlation:.2f}",
                faded=bool(correlation <= data.noise_floor[row]),
            )
    figure.text(0.69, 0.062, "framed blue: same class", fontsize=9.5, color=SAME, fontweight="bold")
    figure.text(0.825, 0.062, "orange, dashed: another class", fontsize=9.5, color=OTHER, fontweight="bold")
    figure.text(0.69, 0.03, "below each neighbor its correlation; pale: not above the noise floor", fontsize=9.5)


def _thumbnail(
    figure: Any, box: tuple[float, float, float, float], image: np.ndarray, *, frame: str, text: str, faded: bool
) -> None:
    x, y, width, height = box
    axes = figure.add_axes((x + 0.06 * width, y + 0.26 * height, 0.88 * width, 0.72 * height))
    alpha = 0.3 if faded else 1.0
    axes.imshow(image, cmap="gray_r", vmin=0, vmax=1, alpha=alpha)
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color=frame, linewidth=2.2, alpha=alpha, linestyle="--" if frame == OTHER else "-")
    axes.set_xlabel(text, fontsize=8.5, labelpad=2, color="0.55" if faded else "black")


def _name(class_names: Sequence[str], label: int) -> str:
    return class_names[label] if label < len(class_names) else str(label)
