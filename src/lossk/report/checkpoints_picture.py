"""A kernel through training, as a PNG file: its correlation matrix at each checkpoint, and how fast it settles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lossk.analysis.compare import Comparison
from lossk.report.class_picture import new_figure
from lossk.report.picture import COLORS

MOST_ROWS = 400  # samples in a matrix


@dataclass(frozen=True)
class Stage:
    """A kernel at one time of training. The last two stages are the trained network, and it again by another seed."""

    name: str
    mean_loss: float  # over draws and samples, nats
    purity: float  # share of the nearest neighbors of the same class
    above_floor: float  # share of them above the noise floor
    verdict: str
    change: Comparison | None  # from the stage before; of the very last stage, from the trained network
    to_last: Comparison | None  # with the trained network's kernel; None of that kernel itself
    block: np.ndarray  # [M, M] correlations of some samples, sorted by class
    block_labels: np.ndarray  # [M], ascending


def draw_stages(stages: Sequence[Stage], path: Path, *, chance: float, title: str) -> None:
    """Matrices in a row, and below them purity, likeness to the trained network's kernel, and change.

    Args:
        stages: checkpoints, the trained network, and the trained network again.
        chance: purity of random neighbors.
    """
    shown = stages[:-1]
    figure = new_figure(max(1.9 * len(shown), 8.5), 6.2)
    width = 0.94 / len(shown)
    limit = max(float(np.quantile(np.abs(s.block - np.diag(np.diag(s.block))), 0.98)) for s in shown)
    for number, stage in enumerate(shown):
        axes = figure.add_axes((0.03 + number * width, 0.53, 0.94 * width, 0.36))
        axes.imshow(stage.block, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
        for edge in np.flatnonzero(np.diff(stage.block_labels)) + 0.5:
            axes.axhline(edge, color="0.6", linewidth=0.3)
            axes.axvline(edge, color="0.6", linewidth=0.3)
        axes.set(xticks=[], yticks=[])
        axes.set_title(_short(stage.name), fontsize=9.5)
        axes.set_xlabel(f"loss {stage.mean_loss:.2f}, purity {stage.purity:.0%}", fontsize=8.5)
    figure.text(0.03, 0.955, title, fontsize=12)
    note = f"Correlations of {len(shown[0].block)} samples sorted by class, red positive; colors end at ±{limit:.2f}"
    figure.text(0.03, 0.928, note, fontsize=8.5, color="0.35")
    _curves(figure, stages, chance)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _curves(figure: Any, stages: Sequence[Stage], chance: float) -> None:
    shown, again = stages[:-1], stages[-1].to_last
    assert again is not None
    places, names = range(len(shown)), [_short(stage.name) for stage in shown]
    left, right = (figure.add_axes((x, 0.1, 0.41, 0.31)) for x in (0.065, 0.565))
    left.plot(places, [stage.purity for stage in shown], "o-", color=COLORS[2], label="neighbors of the same class")
    before = list(places)[:-1]
    near = [stage.to_last for stage in shown[:-1]]
    left.plot(
        before, [c.debiased_cka_r for c in near if c], "o-", color=COLORS[0], label="CKA with the trained network's"
    )
    left.plot(before, [c.overlap for c in near if c], "o-", color=COLORS[1], label="neighbors shared with it")
    left.axhline(chance, color=COLORS[2], linestyle=":", linewidth=1)
    left.set_title("Likeness to the trained network's kernel", fontsize=10, loc="left")
    after = list(places)[1:]
    change = [stage.change for stage in shown[1:]]
    right.plot(after, [c.debiased_cka_r for c in change if c], "o-", color=COLORS[0], label="CKA with the one before")
    right.plot(after, [c.overlap for c in change if c], "o-", color=COLORS[1], label="neighbors kept")
    right.set_title("From each kernel to the next", fontsize=10, loc="left")
    for axes in (left, right):
        axes.axhline(again.debiased_cka_r, color=COLORS[0], linestyle="--", linewidth=1)
        axes.axhline(again.overlap, color=COLORS[1], linestyle="--", linewidth=1)
        axes.set(ylim=(-0.03, 1.03), xlim=(-0.2, len(shown) - 0.8))
        axes.set_xticks(list(places), names, fontsize=8.5)
        axes.tick_params(axis="y", labelsize=8.5)
        axes.legend(fontsize=8, frameon=False)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.text(0.065, 0.022, "dashed: the trained network's kernel with other random numbers, the most that this many "
                "draws allow; dotted: purity by chance", fontsize=8.5, color="0.35")  # fmt: skip


def _short(name: str) -> str:
    """ "seed0-train60000-epoch3of5" as "epoch 3"; other names as they are."""
    head, found, rest = name.rpartition("epoch")
    return f"epoch {rest.split('of')[0]}" if found and head.startswith("seed") else name
