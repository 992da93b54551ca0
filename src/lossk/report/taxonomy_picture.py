"""A map of samples colored by the place of their classes in a taxonomy, as a PNG file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lossk.analysis.maps import KernelMap
from lossk.analysis.taxonomy import Taxonomy
from lossk.analysis.taxonomy_order import places, stretches
from lossk.report.class_picture import new_figure


def draw_taxonomy_map(
    drawn: KernelMap, labels: np.ndarray, taxonomy: Taxonomy, words: Mapping[str, str], path: Path, *, title: str
) -> None:
    """A scatter of the first two dimensions; near colors are near places in the taxonomy.

    Args:
        labels: [N] positions in the taxonomy's classes.
        words: what the nodes are called; a node without an entry shows its own name.
    """
    points, alive = drawn.coordinates[:, :2].numpy(), ~drawn.dead.numpy()
    place, count = places(taxonomy)[labels], len(taxonomy.class_nodes)
    figure = new_figure(10.5, 7.2)
    axes = figure.add_axes((0.03, 0.05, 0.68, 0.84))
    size = float(np.clip(20000 / max(len(points), 1), 1.5, 24.0))
    order = np.random.default_rng(np.random.SeedSequence(0)).permutation(np.flatnonzero(alive))  # no class on top
    margin = 0.06 * count  # turbo's ends are too dark to tell apart
    shown = axes.scatter(*points[order].T, c=place[order], cmap="turbo", vmin=-margin, vmax=count + margin, s=size,
                         linewidths=0, alpha=0.85)  # fmt: skip
    axes.set(xticks=[], yticks=[])
    dead = int(drawn.dead.sum())
    aside = f", {dead:,} whose loss never varied set aside" if dead else ""
    axes.set_title(
        f"{title}: {int(alive.sum()):,} samples of {count:,} classes{aside}", fontsize=12, loc="left", pad=22
    )
    axes.text(0, 1.012, "UMAP: who lies beside whom means something; distances between groups do not",
              transform=axes.transAxes, fontsize=8.5, color="0.35")  # fmt: skip
    bar = figure.colorbar(shown, cax=figure.add_axes((0.735, 0.05, 0.02, 0.84)))
    named = stretches(taxonomy)
    bar.set_ticks([s.first + (s.count - 1) / 2 for s in named],
                  labels=[f"{words.get(s.node, s.node)} ({s.count})" for s in named])  # fmt: skip
    bar.ax.tick_params(length=3, labelsize=9)
    bar.ax.set_ylim(-0.5, count - 0.5)
    for part in named:
        for edge in (part.first - 0.5, part.first + part.count - 0.5):
            bar.ax.axhline(edge, color="white", linewidth=0.8)
    figure.text(0.735, 0.905, "place in the taxonomy\n(classes)", fontsize=8.5, color="0.35")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
