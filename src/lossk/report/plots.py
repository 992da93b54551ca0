"""Pictures of a kernel for a notebook: `kernel.plot_matrix()`, `plot_map()`, `plot_chains()` (`lossk.kernel.views`)."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lossk.checks import wrong_kind
from lossk.errors import LosskError
from lossk.forms.names import Names, read_names
from lossk.kernel.card import color_limit
from lossk.kernel.indexing import resolve
from lossk.optional import require
from lossk.report.picture import COLORS

if TYPE_CHECKING:
    from lossk.kernel.kernel import LossKernel

MOST = 600  # samples in a picture of the matrix


def plot_matrix(kernel: LossKernel, rows: Any = None, *, labels: Any = None, ax: Any = None) -> Any:
    """A picture of the correlations R, sorted by class; at most 600 samples, evenly spaced."""
    names, (figure, axes) = _names(kernel, labels), _canvas(ax, 5.6, 4.8)
    chosen = resolve(slice(None) if rows is None else rows, kernel.num_samples, "rows").numpy()
    shown = chosen[np.unique(np.linspace(0, len(chosen) - 1, min(MOST, len(chosen))).round().astype(np.int64))]
    ordered = ""
    if names.labels is not None:
        shown, ordered = shown[np.argsort(names.labels[shown], kind="stable")], ", sorted by class"
    at = torch.from_numpy(shown)
    block = kernel.correlation(at, at).numpy()
    limit = color_limit(block)
    image = axes.imshow(block, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    figure.colorbar(image, ax=axes, extend="both", label="correlation R", fraction=0.046, pad=0.03)
    if names.labels is None:
        axes.set(xlabel=f"sample{ordered}", ylabel="sample")
    else:
        _class_ticks(axes, names, shown)
    axes.set_title(f"R of {len(shown):,} of {kernel.num_samples:,} {kernel.unit}{ordered}", fontsize=10, loc="left")
    return figure


def plot_map(kernel: LossKernel, *, labels: Any = None, ax: Any = None, seed: int = 0) -> Any:
    """A UMAP map of all samples, colored by class."""
    from lossk.analysis.maps import map_kernel
    from lossk.report.class_picture import MOST_COLORS, NOTE, scatter_map

    names, (figure, axes) = _names(kernel, labels), _canvas(ax, 6.4, 5.2)
    drawn = map_kernel(kernel, seed=seed)
    count = scatter_map(axes, drawn, labels=names.labels, names=names.class_names, title="Map")
    axes.set_xlabel(NOTE, fontsize=8, loc="left")
    if 1 < count <= 2 * MOST_COLORS:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False, markerscale=2.0)
    return figure


def plot_chains(kernel: LossKernel, *, ax: Any = None) -> Any:
    """The mean loss of the watched samples at each draw, a line for each chain.

    Raises:
        LosskError: no traces are kept, in the store of an earlier version.
    """
    watched = kernel._watched()
    if watched is None:
        raise LosskError("this kernel keeps no traces: it is in tiles, and its store is of an earlier version")
    means = watched.losses.double().mean(dim=-1)  # [C, T]
    figure, axes = _canvas(ax, 7.0, 3.2)
    for chain, line in enumerate(means.numpy()):
        axes.plot(np.arange(1, len(line) + 1), line, color=COLORS[chain % len(COLORS)], linewidth=0.9,
                  label=f"chain {chain}")  # fmt: skip
    axes.set(xlabel="draw", ylabel="mean loss [nats]")
    axes.set_title(f"Mean loss of {watched.losses.shape[-1]} samples at each draw", fontsize=10, loc="left")
    if len(means) <= len(COLORS):
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    return figure


def _names(kernel: LossKernel, labels: Any) -> Names:
    return kernel.names if labels is None else read_names(None, labels).check(kernel.num_samples)


def _class_ticks(axes: Any, names: Names, shown: np.ndarray) -> None:
    """The classes' names at the middles of their samples, and lines between them."""
    assert names.labels is not None
    labels = names.labels[shown]
    edges = np.flatnonzero(np.diff(labels)) + 0.5
    for edge in edges if len(edges) < 40 else ():
        axes.axhline(edge, color="black", linewidth=0.4, alpha=0.6)
        axes.axvline(edge, color="black", linewidth=0.4, alpha=0.6)
    bounds = np.concatenate([[-0.5], edges, [len(labels) - 0.5]])
    texts = [names.class_of(int(row)) for row in shown[np.concatenate([[0], np.flatnonzero(np.diff(labels)) + 1])]]
    if len(texts) <= 40:
        middles = (bounds[1:] + bounds[:-1]) / 2
        axes.set_yticks(middles, texts, fontsize=8)
        long = max(map(len, texts)) > 3
        axes.set_xticks(middles, texts, fontsize=8, rotation=45 if long else 0, ha="right" if long else "center")
        axes.tick_params(length=0)


def _canvas(ax: Any, width: float, height: float) -> tuple[Any, Any]:
    """The figure and its axes: the user's, or new ones that a notebook shows by themselves."""
    if ax is not None:
        if not hasattr(ax, "imshow"):
            raise wrong_kind("ax", "axes of matplotlib", ax)
        return ax.figure, ax
    figure = _showing_class()(figsize=(width, height), dpi=110, layout="constrained", facecolor="white")
    return figure, figure.add_subplot()


def _showing_class() -> Any:
    """A figure without pyplot, whose windows and global state nobody asked for; a notebook asks `_repr_png_`."""
    require("matplotlib", "demo", "a picture")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    class Picture(Figure):
        def _repr_png_(self) -> bytes:
            file = io.BytesIO()
            FigureCanvasAgg(self).print_png(file)
            return file.getvalue()

    return Picture
