"""Do the tasks of one network come apart in its kernel?  Networks, controls and snapshots; writes docs/multitask.md.

    python -m bench.studies.multitask --out docs/multitask.md [--picture FILE.png] [--work FOLDER] [--only NAME ...]

A case is run once: its numbers are kept in FOLDER, and a case that is there is not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import lossk
from bench.markdown import replace_between, table
from lossk import provenance
from lossk.analysis import map_kernel
from lossk.analysis.purity import chance_purity, class_purity
from lossk.recipes import RecipeTask, multitask
from lossk.recipes.arithmetic import TASKS, arithmetic
from lossk.report.picture import COLORS
from lossk.samplers.samplers import Sampler

K, CHAINS = 10, 4
ERROR_ROWS = 200  # of the kernel, whose entries' standard errors are worked out: each from all draws
SGLD = lossk.SGLD()  # everything automatic
LOCAL = lossk.Gaussian(sigma=1e-3)  # independent draws so near that only gradients count: no chain, no landscape
SNAPSHOTS = (0, 30, 100, 200, 400, 750, 1000)
# Of every snapshot, so that they can be compared: localization and n_beta as the trained network's pilot chooses them,
# and half its step, as earlier networks may be more curved.
SETTLED = lossk.SGLD(lr=1e-3, n_beta=125.0, localization=400.0, num_burnin_steps=20, num_steps_bw_draws=4)


@dataclass(frozen=True)
class Case:
    """One network and how it is sampled."""

    group: str
    args: Mapping[str, Any] = field(default_factory=dict)  # of multitask.make_task
    sampler: Sampler = SGLD
    num_draws: int = 100

    @property
    def name(self) -> str:
        kind = "local" if isinstance(self.sampler, lossk.Gaussian) else "sgld"
        return f"{self.group}, {kind}, seed {self.args.get('seed', 0)}"

    @property
    def network(self) -> str:
        return f"{self.group}, seed {self.args.get('seed', 0)}.pt"


QUIET = {"loudness": 1.0, "required_accuracy": 0.9}
UNTRAINED = {"epochs": 0, "required_accuracy": 0.0}
RANDOM = {"answers": "random", "epochs": 150}
FOUR = {"num_tasks": 4, "p": 31, "hidden": 512, "train_share": 0.9, "epochs": 700, "plain_share": 0.15}


def cases() -> list[Case]:
    """The most telling first."""
    disjoint = lossk.SGLD(batch_size=None)  # full gradients: a minibatch would couple the networks by its composition
    return [
        Case("two tasks"),
        Case("random answers", RANDOM),
        Case("two tasks", sampler=LOCAL),
        Case("random answers", RANDOM, LOCAL),
        Case("untrained", UNTRAINED, LOCAL),
        Case("disjoint", {"network": "disjoint", "hidden": 128}, disjoint),
        *(Case("shared trunk", {"network": "trunk", "seed": seed}) for seed in range(3)),
        *(Case("two tasks", {"seed": seed}) for seed in (1, 2)),
        *(Case("random answers", {**RANDOM, "seed": seed}) for seed in (1, 2)),
        # Seeds 2 and 3 stay at 98.96 % on a + 2b, below the 99 % that the recipe asks for.
        *(Case("four tasks", {**FOUR, "seed": seed}) for seed in (0, 1)),
        Case("quiet token", QUIET, LOCAL),
        Case("quiet token, random answers", {**RANDOM, **QUIET}, LOCAL),
        Case("quiet token, untrained", {**QUIET, **UNTRAINED}, LOCAL),
    ]


def measure(traces: lossk.LossTraces, tasks: Tensor) -> dict[str, float]:
    """What the kernel of some traces says about the tasks [N] of its samples.

    Means over pairs of different samples, of the same and of different tasks; standard errors from the spread of the
    chains' own kernels, each centered on its own mean.
    """
    kernel = lossk.LossKernel.from_traces(traces)
    neighbors = kernel.neighbors(K)
    same = tasks.unsqueeze(1) == tasks
    pairs = {"within": same & ~torch.eye(len(tasks), dtype=torch.bool), "across": ~same}
    by_chain = [_correlation(losses) for losses in traces.losses]  # C times [N, N]
    whole = kernel.correlation()
    found: dict[str, float] = {}
    for name, chosen in pairs.items():
        means = torch.stack([each[chosen].mean() for each in by_chain])
        found[f"R {name}"], found[f"R {name} se"] = float(whole[chosen].mean()), _error(means)
        found[f"|R| {name}"] = float(whole[chosen].abs().mean())
        found[f"|R| {name} se"] = _error(torch.stack([each[chosen].abs().mean() for each in by_chain]))
    gaps = torch.stack([each[pairs["within"]].mean() - each[pairs["across"]].mean() for each in by_chain])
    spreads = torch.stack([e[pairs["within"]].abs().mean() - e[pairs["across"]].abs().mean() for e in by_chain])
    rows = torch.linspace(0, len(tasks) - 1, min(ERROR_ROWS, len(tasks))).long()  # samples are in a random order
    errors, other = kernel.standard_error(rows, torch.arange(len(tasks)), correlation=True), ~same[rows]
    beyond = ((whole[rows].abs() > 1.96 * errors) & other).sum() / other.sum()
    alive = ~kernel.dead
    return {
        **found,
        "purity": class_purity(neighbors.index, tasks),
        "chance": chance_purity(tasks),
        "gap": float(gaps.mean()),
        "gap se": _error(gaps),
        "|R| gap z": float(spreads.mean()) / max(_error(spreads), 1e-30),
        "noise floor": float(neighbors.noise_floor[alive].median()),
        "null |R|": float(errors[other].mean()) * math.sqrt(2 / math.pi),  # E|R| of unrelated samples
        "across beyond 1.96 se": float(beyond),
        "above floor": float((neighbors.correlation > neighbors.noise_floor.unsqueeze(1)).float().mean()),
    }


def _correlation(losses: Tensor) -> Tensor:
    """[N, N] float64 of one chain's losses [T, N]; constant losses correlate with nothing."""
    centered = losses.double() - losses.double().mean(dim=0)
    norm = centered.norm(dim=0)
    unit = torch.where(norm > 0, centered / norm.clamp(min=1e-300), 0.0)
    return unit.T @ unit


def _error(values: Tensor) -> float:
    return float(values.double().std()) / math.sqrt(len(values))


def run(case: Case, work: Path) -> dict[str, Any]:
    """Train, sample and measure, or read what was measured before."""
    path = work / f"{case.name}.json"
    if path.exists():
        return json.loads(path.read_text())
    started = time.process_time()
    task = multitask.make_task(**case.args, checkpoint=work / case.network)
    trained = time.process_time()
    traces = lossk.sample_losses(
        task.model, task.samples, train=task.train, sampler=case.sampler, num_chains=CHAINS, num_draws=case.num_draws
    )
    assert task.labels is not None
    sampled = time.process_time()
    kernel = lossk.LossKernel.from_traces(traces)
    diagnostics = kernel.diagnostics
    assert diagnostics is not None
    if case.name in PICTURED:
        np.savez(work / f"{case.name}.map.npz", points=map_kernel(kernel).coordinates, tasks=task.labels)
    found = {
        **measure(traces, task.labels),
        "group": case.group,
        "notes": task.notes,
        "accuracy": least_accuracy(task),
        "samples": len(task.labels),
        "draws": case.num_draws,
        "sampler": traces.meta["sampler"],
        "verdict": diagnostics.verdict,
        "ess": diagnostics.sample_ess,
        "rhat": diagnostics.sample_rhat,
        "training s": trained - started,
        "sampling s": sampled - trained,
        "git": provenance.git_sha(),
    }
    path.write_text(json.dumps(found, indent=1))
    return found


def least_accuracy(task: RecipeTask) -> float:
    """Held-out accuracy of the worst task."""
    inputs, targets = task.samples.tensors
    assert task.labels is not None
    assert task.held_out is not None
    own = [task.held_out & (task.labels == number) for number in range(len(task.class_names))]
    return min(multitask.accuracy(task.model, inputs[rows], targets[rows]) for rows in own)


def snapshots(work: Path, at: Sequence[int] = SNAPSHOTS, **args: Any) -> list[dict[str, Any]]:
    """The two-task network of seed 0 while it is trained: by independent draws w* + 0.001 xi, and by settled SGLD."""
    path = work / "snapshots.json"
    if path.exists() or not at:
        return json.loads(path.read_text()) if path.exists() else []
    settings = {"p": 23, "hidden": 256, "loudness": 3.0, "train_share": 0.8, "num_draws": 50, **args}
    inputs, targets, tasks, num_train = arithmetic(settings["p"], settings["train_share"], 0)
    model = multitask.make_network("one", settings["p"], 2, settings["hidden"], settings["loudness"], 0)
    held_out, found = torch.arange(len(targets)) >= num_train, []

    def note(epoch: int) -> None:
        if epoch not in at:
            return
        model.eval()
        part = {"num_chains": CHAINS, "num_draws": settings["num_draws"], "progress": False}
        local = lossk.sample_losses(model, (inputs, targets), sampler=LOCAL, **part)
        traces = lossk.sample_losses(
            model, (inputs, targets), train=(inputs[:num_train], targets[:num_train]), sampler=SETTLED, **part
        )
        training = multitask.accuracy(model, inputs[~held_out], targets[~held_out])
        held = multitask.accuracy(model, inputs[held_out], targets[held_out])
        rows = {"training": training, "held out": held, "local purity": measure(local, tasks)["purity"]}
        found.append({"epoch": epoch, **rows, **measure(traces, tasks)})

    note(0)
    multitask.train(model, inputs[:num_train], targets[:num_train], max(at), each_epoch=note)
    path.write_text(json.dumps(found, indent=1))
    return found


ABSOLUTE = (r"\|R\| within", r"\|R\| across", "unrelated")  # a bare bar would end a cell
GROUPS = {"all weights": ("*",), "all but the token's": ("pairs.*", "head.*"), "the pair's alone": ("pairs.weight",)}
EXACT = (
    ("two tasks", {}),
    ("random answers", RANDOM),
    ("untrained", UNTRAINED),
    ("quiet token", QUIET),
    ("quiet token, random answers", {**RANDOM, **QUIET}),
    ("quiet token, untrained", {**QUIET, **UNTRAINED}),
)


def gradient_purity(task: RecipeTask, patterns: Sequence[str]) -> float:
    """Purity of the kernel that independent draws ever nearer to w* tend to: cosines of the samples' gradients, exact.

    Of the weights whose names match `patterns`; float64.
    """
    assert task.labels is not None
    model = copy.deepcopy(task.model).double()
    weights = {name: value.detach() for name, value in model.named_parameters()}
    moved = {name: value for name, value in weights.items() if any(fnmatch(name, p) for p in patterns)}

    def loss(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, {**weights, **values}, (x.unsqueeze(0),))
        return torch.nn.functional.cross_entropy(logits, y.unsqueeze(0))

    inputs, targets = task.samples.tensors
    of_each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(moved, inputs.double(), targets)
    rows = torch.cat([value.flatten(1) for value in of_each.values()], dim=1)  # [N, weights]
    rows /= rows.norm(dim=1, keepdim=True).clamp(min=1e-300)
    cosine = (rows @ rows.T).fill_diagonal_(-math.inf)
    return class_purity(cosine.topk(K, dim=1).indices, task.labels)


def exact(work: Path, networks: Sequence[tuple[str, Mapping[str, Any]]] = EXACT) -> list[dict[str, Any]]:
    """Purity without sampling noise, of what was learned and of what was not."""
    path = work / "exact.json"
    if path.exists() or not networks:
        return json.loads(path.read_text()) if path.exists() else []
    found = []
    for name, args in networks:
        task = multitask.make_task(**args, checkpoint=work / f"{name}, seed 0.pt")
        purities = {group: gradient_purity(task, patterns) for group, patterns in GROUPS.items()}
        found.append({"name": name, "accuracy": least_accuracy(task), **purities})
    path.write_text(json.dumps(found, indent=1))
    return found


def page(
    found: Sequence[Mapping[str, Any]], shots: Sequence[Mapping[str, Any]], limits: Sequence[Mapping[str, Any]]
) -> str:
    """The tables of docs/multitask.md."""
    head = ["network", "held out", "purity (chance)", "R within", "R across", "gap / se", *ABSOLUTE, "beyond"]
    rows = [
        [
            one["name"],
            f"{one['accuracy']:.1%}",
            f"{one['purity']:.3f} ({one['chance']:.2f})",
            f"{one['R within']:.4f} ± {one['R within se']:.4f}",
            f"{one['R across']:.4f} ± {one['R across se']:.4f}",
            f"{one['gap'] / max(one['gap se'], 1e-30):.1f}",
            f"{one['|R| within']:.4f}",
            f"{one['|R| across']:.4f}",
            f"{one['null |R|']:.4f}",
            f"{one['across beyond 1.96 se']:.1%}",
        ]
        for one in found
    ]
    tried = ["epoch", "training", "held out", "purity, local", "purity, sgld", "R within", "R across", "gap / se"]
    stages = [
        [
            f"{one['epoch']:,}",
            f"{one['training']:.1%}",
            f"{one['held out']:.1%}",
            f"{one['local purity']:.3f}",
            f"{one['purity']:.3f}",
            f"{one['R within']:.4f} ± {one['R within se']:.4f}",
            f"{one['R across']:.4f} ± {one['R across se']:.4f}",
            f"{one['gap'] / max(one['gap se'], 1e-30):.1f}",
        ]
        for one in shots
    ]
    bare = [[one["name"], f"{one['accuracy']:.1%}", *(f"{one[group]:.3f}" for group in GROUPS)] for one in limits]
    parts = [table(head, rows)]
    if bare:
        parts += ["## Without sampling noise", BARE, table(["network", "held out", *GROUPS], bare)]
    if stages:
        parts += ["## Snapshots through training", table(tried, stages)]
    return "\n\n".join(parts) + "\n"


BARE = """Purity by cosines of the samples' gradients at w\\* (float64), the limit of ever nearer draws, of some or all
weights."""


PICTURED = {
    "two tasks, sgld, seed 0": "two tasks, generalising",
    "random answers, sgld, seed 0": "two tables of random answers, memorised",
    "shared trunk, sgld, seed 0": "two tasks, shared trunk",
    "four tasks, sgld, seed 0": "four tasks, generalising",
}


def draw(work: Path, path: Path) -> None:
    """UMAP maps of the networks in `PICTURED` that have been run, colored by task."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    there = {name: title for name, title in PICTURED.items() if (work / f"{name}.map.npz").exists()}
    figure = Figure(figsize=(3.3 * len(there), 3.8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(there), squeeze=False)[0]
    for axes, (name, title) in zip(panels, there.items(), strict=True):
        held = np.load(work / f"{name}.map.npz")
        for task in np.unique(held["tasks"]):
            axes.scatter(*held["points"][held["tasks"] == task].T, s=3, color=COLORS[task], linewidths=0,
                         label=TASKS[task] if "random" not in name else f"table {task + 1}")  # fmt: skip
        axes.set(xticks=[], yticks=[])
        axes.set_title(title, fontsize=9.5)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.01), ncol=4, fontsize=8, frameon=False,
                    markerscale=3, handletextpad=0.1, columnspacing=0.8)  # fmt: skip
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the page; its tables stand between two marks. Without: printed")
    parser.add_argument("--work", type=Path, default=Path("multitask"), help="folder of networks and numbers")
    parser.add_argument("--only", nargs="*", help="groups of cases")
    parser.add_argument("--finished", action="store_true", help="nothing is run: a page of what FOLDER holds")
    parser.add_argument("--picture", type=Path, help="a PNG of the maps")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    wanted = [case for case in cases() if options.only is None or case.group in options.only]
    if options.finished:
        wanted = [case for case in wanted if (options.work / f"{case.name}.json").exists()]
    found = [{**run(case, options.work), "name": case.name} for case in wanted]
    shots = snapshots(options.work, at=() if options.finished else SNAPSHOTS)
    text = page(found, shots, exact(options.work, () if options.finished else EXACT))
    if options.picture is not None:
        draw(options.work, options.picture)
    if options.out is None:
        print(text)
    else:
        options.out.write_text(replace_between(options.out.read_text(), MARKS, text))


MARKS = "<!-- made by python -m bench.studies.multitask -->", "<!-- end -->"


if __name__ == "__main__":
    main()
