"""How much does the kernel depend on its settings?  Curves over n_beta, localization and lr on the digits network.

    python -m bench.studies.sensitivity --out docs/images/sensitivity.png

One setting of the probe law (n_beta, localization) or of SGLD (lr; its burn-in and spacing stay) is multiplied by a
factor. Other laws are sampled by lossk.BAOAB with full gradients: where n_beta is large, what noise a control variate
leaves would hold a minibatch chain to hundreds of steps a draw.
Shown is the correlation of the kernel's entries above the diagonal with those of the default settings (another seed),
and its ceiling, the geometric mean of the two kernels' reliabilities (halves of their chains, Spearman-Brown).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
import torch

import lossk
from bench.studies.fashion_auto import CHAINS
from bench.studies.time_to_truth_statistics import entries, reliability
from lossk import provenance
from lossk.cli.grid_cell import choose_probe
from lossk.recipes import digits

FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)
SETTINGS = ("n_beta", "localization", "lr")
PROBE = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a PNG; the numbers go beside it as JSON")
    parser.add_argument("--num-draws", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = digits.make_task()
    assert task.labels is not None
    index = choose_probe(len(task.labels), task.labels, PROBE)
    probe = tuple(part[index] for part in task.samples)

    def run(sampler: lossk.SGLD | lossk.BAOAB, seed: int) -> lossk.LossTraces:
        return lossk.sample_losses(
            task.model, probe, train=task.train, sampler=sampler, num_chains=CHAINS, num_draws=options.num_draws,
            seed=seed, progress=False,
        )  # fmt: skip

    base = run(lossk.SGLD(), 0)
    chosen = base.meta["sampler"]
    base_entries, base_trust = entries(base.losses), reliability(base.losses)
    points: list[dict[str, Any]] = []
    for name in SETTINGS:
        for factor in FACTORS:
            changes = {name: chosen[name] * factor}
            law = {half: chosen[half] for half in ("n_beta", "localization")}
            exact = {"batch_size": None, "control_variate": False}
            sampler = (
                lossk.SGLD(**{**chosen, **changes}) if name == "lr" else lossk.BAOAB(**{**law, **changes}, **exact)
            )
            point: dict[str, Any] = {"setting": name, "factor": factor}
            try:
                traces = run(sampler, 1)
            except lossk.DivergedError as error:
                point["diverged"] = str(error)
            else:
                likeness, trust = base_entries.likeness(entries(traces.losses)), reliability(traces.losses)
                for kind in ("K", "R"):
                    point[kind] = likeness[kind]
                    point[f"{kind} ceiling"] = max(base_trust[kind] * trust[kind], 0.0) ** 0.5
            points.append(point)
            print(point, flush=True)
    record = {
        "middle": chosen, "probe": PROBE, "chains": CHAINS, "draws": options.num_draws, "points": points,
        "versions": provenance.versions(), "git_sha": provenance.git_sha(),
    }  # fmt: skip
    options.out.with_suffix(".json").write_text(json.dumps(record, indent=1, default=str) + "\n")
    draw(record, options.out)


def draw(record: dict[str, Any], path: Path) -> None:
    """Three panels, one per setting."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(SETTINGS), figsize=(11.0, 3.7), sharey=True, layout="constrained")
    for axis, name in zip(axes, SETTINGS, strict=True):
        every = [point for point in record["points"] if point["setting"] == name]
        points = [point for point in every if "R" in point]
        factors = [point["factor"] for point in points]
        for kind, color in (("R", "#1f5fa8"), ("K", "#c9702b")):
            axis.plot(factors, [point[kind] for point in points], "o-", color=color, ms=4,
                      label=f"{kind} entries, with the default's")  # fmt: skip
            axis.plot(factors, [point[f"{kind} ceiling"] for point in points], ":", color=color, lw=1.2,
                      label=f"{kind} ceiling (noise of both)")  # fmt: skip
        for point in every:
            if "R" not in point:
                axis.annotate(
                    "diverged", (point["factor"], 0.03), rotation=90, ha="center", va="bottom", color="#777777"
                )
        axis.axvline(1.0, color="#bbbbbb", lw=0.8, zorder=0)
        axis.set_xscale("log")
        axis.set_xlim(min(FACTORS) / 1.4, max(FACTORS) * 1.4)
        axis.set_ylim(0, 1.03)
        axis.set_xlabel(f"{name} / default ({float(record['middle'][name]):.3g})")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("correlation of entries")
    axes[0].legend(fontsize=7.5, frameon=False, loc="lower left")
    title = "How the loss kernel of the digits network depends on the sampler's settings"
    figure.suptitle(f"{title}  ({record['chains']} x {record['draws']} draws)", fontsize=11)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
