"""Pictures of a map and of a class hierarchy, as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lossk.analysis.hierarchy import ClassSimilarity, Dendrogram
from lossk.analysis.maps import KernelMap
from lossk.report.picture import COLORS

MOST_COLORS = len(COLORS)
NOTE = "UMAP: who lies beside whom means something; distances between groups do not"


def new_figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, facecolor="white")  # not pyplot: no global state, no display
    FigureCanvasAgg(figure)
    return figure


def draw_map(
    drawn: KernelMap, path: Path, *, labels: np.ndarray | None, names: Sequence[str], title: str = "Loss kernel map"
) -> None:
    """A PNG of `scatter_map`."""
    figure = new_figure(8.5, 7)
    groups = scatter_map(figure.add_axes((0.04, 0.1, 0.92, 0.82)), drawn, labels=labels, names=names, title=title)
    if 1 < groups <= 2 * MOST_COLORS:
        figure.legend(loc="lower center", ncol=min(6, groups), fontsize=9, frameon=False, markerscale=2.5)
    figure.text(0.04, 0.015 if groups == 1 else 0.945, NOTE, fontsize=8.5, color="0.35")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def scatter_map(axes: Any, drawn: KernelMap, *, labels: np.ndarray | None, names: Sequence[str], title: str) -> int:
    """A scatter of the first two dimensions, colored by label (at most ten have a color of their own).

    Returns:
        How many labels there are, 1 without.
    """
    points = drawn.coordinates[:, :2].numpy()
    alive = ~drawn.dead.numpy()
    size = float(np.clip(20000 / max(len(points), 1), 1.0, 14.0))
    groups = [None] if labels is None else sorted(set(labels[alive].tolist()))
    for position, label in enumerate(groups):
        chosen = alive if label is None else alive & (np.asarray(labels) == label)
        color = "0.75" if label == -1 else COLORS[position % MOST_COLORS]
        name = "samples" if label is None else "no cluster" if label == -1 else _name(names, label)
        axes.scatter(*points[chosen].T, s=size, color=color, linewidths=0, alpha=0.75, label=name)
    axes.set(xticks=[], yticks=[])
    dead = int(drawn.dead.sum())
    aside = f", {dead:,} whose loss never varied set aside" if dead else ""
    axes.set_title(f"{title}: {int(alive.sum()):,} samples{aside}", fontsize=12, loc="left")
    return len(groups)


def _name(names: Sequence[str], label: int) -> str:
    return names[label] if 0 <= label < len(names) else str(label)


def draw_hierarchy(similarity: ClassSimilarity, tree: Dendrogram, path: Path) -> None:
    """The dendrogram of classes, and beside it their mean correlations in its order."""
    from scipy.cluster.hierarchy import dendrogram

    count = len(tree.class_names)
    figure = new_figure(11, max(4.5, 2.2 + 0.3 * count))
    left = figure.add_axes((0.02, 0.12, 0.3, 0.76))
    found = dendrogram(tree.linkage, orientation="left", ax=left, no_labels=True, color_threshold=0,
                       above_threshold_color="0.25")  # fmt: skip
    left.set_xlabel(r"$\sqrt{2\,(1-\bar{R})}$", fontsize=10)
    left.set_title(f"Dendrogram (cophenetic correlation {tree.cophenetic_correlation:.2f})", fontsize=10.5, loc="left")
    for side in ("top", "right", "left"):
        left.spines[side].set_visible(False)
    order = found["leaves"]
    matrix = similarity.matrix[np.ix_(order, order)]
    right = figure.add_axes((0.45, 0.12, 0.44, 0.76))
    off = matrix[~np.eye(count, dtype=bool)]
    limit = max(float(np.nanmax(np.abs(off))), 1e-6)
    image = right.imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit, origin="lower", aspect="auto")
    names = [tree.class_names[i] for i in order]
    size = 9 if count <= 25 else 4
    right.set_yticks(range(count), names, fontsize=size)
    right.set_xticks(range(count), names, fontsize=size, rotation=35, ha="right", rotation_mode="anchor")
    right.tick_params(length=0)
    if count <= 15:
        for (i, j), value in np.ndenumerate(matrix):
            dark = abs(value) > 0.6 * limit
            right.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color="white" if dark else "black")
    right.set_title("Mean correlation of losses, pairs of different samples", fontsize=10.5, loc="left")
    bar = figure.colorbar(image, cax=figure.add_axes((0.91, 0.12, 0.015, 0.76)), extend="both")
    bar.set_label("mean R (the diagonal may lie beyond the ends)", fontsize=8.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
