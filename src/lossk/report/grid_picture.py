"""One picture of a grid over n_beta and localization: color is the verdict, text the numbers behind it."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Tol's light scheme: colors that color-blind readers can tell apart, all light enough for black text.
COLORS = {
    "good": "#44BB99",
    "too few draws": "#EEDD88",
    "too few draws for these neighbors": "#BBCC33",
    "not determined": "#E8D8F0",
    "chains disagree": "#FFAABB",
    "not burned in": "#99DDFF",
    "too much noise": "#77AADD",
    "step too large": "#EE8866",
    "steps rejected": "#CC99BB",
    "no minimum": "#BBAA99",
    "too little signal": "#DDDDDD",
    "unchecked": "#FFFFFF",
    "diverged": "#404040",
}
OTHER = "#AAAA00"
CELL_WIDTH, CELL_HEIGHT = 2.35, 1.12  # inches
LEFT, RIGHT, TOP, BOTTOM = 1.25, 0.3, 1.15, 1.25
LEAST_WIDTH = 8.4  # that title and legend fit


def draw_grid(
    results: Sequence[Mapping[str, Any]],
    path: Path,
    *,
    title: str,
    subtitles: Sequence[str],
    middle: Mapping[str, float],
    recommended: Mapping[str, Any] | None,
) -> None:
    """Write a PNG. Needs matplotlib.

    Args:
        subtitles: up to two lines below the title.
        results: of `lossk.cli.grid_cell.run_cell`, every n_beta with every localization.
        middle: the n_beta and localization to frame: what the pilot, or the config, chose.
        recommended: the one of `results` to mark with a star.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    columns = sorted({cell["sampler"]["n_beta"] for cell in results})
    rows = sorted({cell["sampler"]["localization"] for cell in results})
    width = max(LEFT + RIGHT + CELL_WIDTH * len(columns), LEAST_WIDTH)
    height = TOP + BOTTOM + CELL_HEIGHT * len(rows)
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")  # not pyplot: no global state, no display
    FigureCanvasAgg(figure)
    lines = [(title, 0.34, 14, "bold", "black"), *((text, 0.66 + 0.24 * i, 10, "normal", "0.3")
             for i, text in enumerate(subtitles))]  # fmt: skip
    for text, down, size, weight, color in lines:
        short = _shortened(text, width, size / 72 * (0.76 if weight == "bold" else 0.6))
        figure.text(0.2 / width, 1 - down / height, short, fontsize=size, fontweight=weight, color=color, va="center")
    extent = (CELL_WIDTH * len(columns) / width, CELL_HEIGHT * len(rows) / height)
    axes = figure.add_axes((LEFT / width, BOTTOM / height, *extent))
    for cell in results:
        x, y = columns.index(cell["sampler"]["n_beta"]), rows.index(cell["sampler"]["localization"])
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=COLORS.get(cell["verdict"], OTHER),
                                 edgecolor="0.8", linewidth=1))  # fmt: skip
        color = "white" if cell["verdict"] == "diverged" else "black"
        star = "\N{BLACK STAR} " if cell is recommended else ""
        verdict = star + textwrap.fill(cell["verdict"], 24)
        letters = 8.5 if "\n" in verdict else 10
        axes.text(x, y + 0.31, verdict, fontsize=letters, fontweight="bold", color=color, ha="center", va="center")
        axes.text(x, y - 0.1, cell_text(cell), fontsize=8.5, color=color, ha="center", va="center", linespacing=1.3)
    if middle["n_beta"] in columns and middle["localization"] in rows:
        corner = (columns.index(middle["n_beta"]) - 0.47, rows.index(middle["localization"]) - 0.47)
        axes.add_patch(Rectangle(corner, 0.94, 0.94, fill=False, edgecolor="black", linewidth=2.4))
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(-0.5, len(rows) - 0.5))
    axes.set_xticks(range(len(columns)), [f"{value:g}" for value in columns], fontsize=10)
    axes.set_yticks(range(len(rows)), [f"{value:g}" for value in rows], fontsize=10)
    axes.set_xlabel("n_beta: weight of the training loss", fontsize=10.5)
    pull = "localization: pull towards the trained weights" if len(rows) > 2 else "localization"
    middle_height = BOTTOM / height + extent[1] / 2
    figure.text(0.3 / width, middle_height, pull, fontsize=10.5, rotation=90, ha="center", va="center")
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    _legend(figure, results, recommended is not None)
    figure.savefig(path)


def _shortened(text: str, width: float, inches_per_letter: float) -> str:
    most = int((width - 0.4) / inches_per_letter)
    return text if len(text) <= most else text[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"


def cell_text(cell: Mapping[str, Any]) -> str:
    """The numbers in a cell, three lines."""
    if cell.get("rise") is None:
        return f"lr {cell['sampler']['lr']:.2g}"
    third = [f"rise {cell['rise']:.2g} nats"]
    if cell.get("purity") is not None:
        third.append(f"purity {cell['purity']:.0%}")
    first = f"R-hat {number(cell['rhat'], 2)}   ESS {number(cell['ess'], 0)}"
    return "\n".join(
        [first, f"LLC {number(cell['llc'], 3, 'g')} ± {number(cell['llc_se'], 1, 'g')}", "   ".join(third)]
    )


def number(value: float | None, digits: int, kind: str = "f") -> str:
    """With so many decimals ("f") or significant digits ("g"); "-" where unknown."""
    if value is not None and kind == "g" and abs(value) >= 100:
        return f"{value:.0f}"
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}{kind}}"


def _legend(figure: Any, results: Sequence[Mapping[str, Any]], starred: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    present = {cell["verdict"] for cell in results}
    known = [verdict for verdict in COLORS if verdict in present] + sorted(present - COLORS.keys())
    handles: list[Any] = [Patch(facecolor=COLORS.get(v, OTHER), edgecolor="0.5", label=v) for v in known]
    handles.append(Patch(fill=False, edgecolor="black", linewidth=2.4, label="the automatic (or config's) choice"))
    if starred:
        handles.append(Line2D([], [], linestyle="", marker="*", color="black", markersize=11, label="recommended"))
    figure.legend(handles=handles, loc="lower center", ncol=4, fontsize=9, frameon=False)
