"""Pictures of a kernel and its report, as methods: each is found by its name when it is called.

A kernel draws nothing: pictures and pages stand on a higher floor. They are entry points of the group `lossk.views` in
pyproject.toml, functions whose first argument is the kernel; another distribution may replace none of lossk's own.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lossk.errors import LosskError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GROUP = "lossk.views"


def view(name: str) -> Any:
    """The function of an entry point.

    Raises:
        LosskError: lossk is not installed, or was installed before it had this one.
    """
    found = [entry for entry in entry_points(group=GROUP, name=name) if entry.value.startswith("lossk.")]
    if not found:
        raise LosskError(f"kernel.{name} is part of an installed lossk: pip install . in its folder, once more")
    return found[0].load()


class Views:
    """The pictures of a kernel, and its report."""

    def plot_matrix(self, rows: Any = None, *, labels: Any = None, ax: Any = None) -> Figure:
        """A picture of the correlations R, sorted by class; at most 600 samples, evenly spaced. Needs lossk[demo].

        Args:
            rows: the samples that are shown, any index that `kernel[rows]` takes; None for all.
            labels: [N] integers or texts; None is the kernel's own.
            ax: matplotlib axes to draw into; None makes a figure, which a notebook shows.
        """
        return view("plot_matrix")(self, rows, labels=labels, ax=ax)

    def plot_map(self, *, labels: Any = None, ax: Any = None, seed: int = 0) -> Figure:
        """A UMAP map of all samples, colored by class. Needs lossk[analysis].

        Args:
            labels: [N] integers or texts; None is the kernel's own.
            ax: matplotlib axes to draw into; None makes a figure.
            seed: of the map.
        """
        return view("plot_map")(self, labels=labels, ax=ax, seed=seed)

    def plot_chains(self, *, ax: Any = None) -> Figure:
        """The mean loss of the watched samples (up to 256) at each draw, a line for each chain. Needs lossk[demo]."""
        return view("plot_chains")(self, ax=ax)

    def report(self, path: str | Path, **options: Any) -> Path:
        """Write the report, one HTML file complete in itself: `lossk.report.write_report`. Needs lossk[report].

        Args:
            path: of the HTML file.
            options: those of `write_report`: labels=, images=, texts=, overwrite=, and so on.
        """
        return view("report")(self, path, **options)
