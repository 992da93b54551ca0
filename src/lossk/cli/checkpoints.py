"""What `lossk run` does with a task that kept checkpoints: its kernel through training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import lossk
from lossk.analysis.compare import Comparison, compare_kernels
from lossk.analysis.purity import chance_purity, class_purity
from lossk.cli.config import RunConfig
from lossk.interop.checkpoints import over_checkpoints
from lossk.kernel.kernel import LossKernel
from lossk.recipes import RecipeTask
from lossk.report.checkpoints_picture import MOST_ROWS, Stage, draw_stages
from lossk.report.picture import thin
from lossk.samplers.samplers import read_sampler
from lossk.task.passes import Passes
from lossk.timings import duration

K = 10
CHANGES = (
    "entry_correlation_k", "entry_correlation_r", "cka_k", "cka_r", "debiased_cka_k", "debiased_cka_r", "overlap",
    "chance_overlap",
)  # fmt: skip


def checkpoint_outputs(out: Path) -> tuple[Path, Path]:
    """Where a run writes the table and the picture of its checkpoints."""
    return out.with_suffix(".checkpoints.csv"), out.with_suffix(".checkpoints.png")


@dataclass(frozen=True)
class Follow:
    """Builds the kernel of a model as it is now, as the finished `kernel` was built, and looks at it."""

    task: RecipeTask
    config: RunConfig
    kernel: LossKernel  # of the trained network

    def build(self, model: nn.Module, number: int) -> LossKernel:
        """In memory, at the settings that were chosen for the trained network, with random numbers of its own.

        Kernels of the same random numbers would be alike for those, and not only for their networks.
        """
        meta, task = self.kernel.meta, self.task
        own = np.random.SeedSequence(int(meta["config"]["seed"]), spawn_key=(number,))
        settings = {**self.config.build, "seed": int(own.generate_state(1)[0])}
        return lossk.build_kernel(
            model,
            task.samples,
            train=task.train,
            loss=task.loss,
            transform=task.transform,
            sampler=read_sampler({"kind": meta["config"]["sampler_kind"], **meta["sampler"]}),
            passes=Passes(**meta["passes"]),
            distributed=False,
            **settings,
        )

    def stage(self, name: str, kernel: LossKernel, change: Comparison | None, to_last: Comparison | None) -> Stage:
        """A kernel's row of the table and column of the picture."""
        labels = self.task.labels
        assert labels is not None
        rows = torch.from_numpy(thin(labels.numpy(), MOST_ROWS, 0))
        rows = rows[torch.argsort(labels[rows], stable=True)]
        neighbors = kernel.neighbors(K)
        above = (neighbors.correlation > neighbors.noise_floor.unsqueeze(1)) & (neighbors.index >= 0)
        return Stage(
            name=name,
            mean_loss=float(kernel.mean_loss.mean()),
            purity=class_purity(neighbors.index, labels),
            above_floor=float(above.double().mean()),
            verdict="" if kernel.diagnostics is None else kernel.diagnostics.verdict,
            change=change,
            to_last=to_last,
            block=kernel.correlation(rows, rows).numpy(),
            block_labels=labels[rows].numpy(),
        )

    def stages(self) -> Iterator[Stage]:
        """One by one: each checkpoint's, the trained network's, and the same network's again with another seed."""
        before, numbers = None, count()

        def build(model: nn.Module) -> LossKernel:
            return self.build(model, next(numbers))

        for step in over_checkpoints(self.task.model, self.task.checkpoints, build, k=K):
            before = step.kernel
            yield self.stage(Path(step.name).stem, before, step.change, compare_kernels(before, self.kernel, k=K))
        change = None if before is None else compare_kernels(before, self.kernel, k=K)
        yield self.stage("trained", self.kernel, change, None)
        again = self.build(self.task.model, next(numbers))
        repeated = compare_kernels(again, self.kernel, k=K)
        yield self.stage("trained, again", again, repeated, repeated)


def show_checkpoints(kernel: LossKernel, task: RecipeTask, config: RunConfig, out: Path) -> tuple[Path, Path]:
    """Build, print, write; returns the paths of the table and of the picture.

    Every kernel is built at the settings that were chosen for the trained network, with random numbers of its own; the
    last row, the trained network's kernel once more, says how alike two kernels of one network are at this many draws.
    """
    from lossk.analysis.tables import write_table

    assert task.labels is not None
    number = len(task.checkpoints) + 1
    each = duration(float(kernel.meta["timings"]["total"]))
    print(f"{number} more kernels: {number - 1} checkpoints, and the trained network again; about {each} each")
    found = list(Follow(task, config, kernel).stages())
    print(describe_stages(found, chance_purity(task.labels)))
    table, picture = checkpoint_outputs(out)
    rows = [_plain(stage) for stage in found]
    write_table({key: [row[key] for row in rows] for key in rows[0]}, table)
    draw_stages(found, picture, chance=chance_purity(task.labels), title=task.notes.splitlines()[0])
    return table, picture


def describe_stages(found: list[Stage], chance: float) -> str:
    """A line for each kernel."""
    lines = [
        "Through training (CKA: debiased, of R; kept: neighbors shared with the kernel before; of the last: with the "
        f"trained network's; purity by chance {chance:.1%}):",
        f"  {'kernel':24s} mean loss  purity  above floor    CKA   kept  CKA last  of the last",
    ]
    for stage in found:
        change, last = (_pair(comparison) for comparison in (stage.change, stage.to_last))
        lines.append(
            f"  {stage.name:24s} {stage.mean_loss:9.3f}  {stage.purity:6.1%}  {stage.above_floor:11.1%}  "
            f"{change[0]:>5s}  {change[1]:>5s}  {last[0]:>8s}  {last[1]:>11s}  {stage.verdict}"
        )
    return "\n".join(lines)


def _pair(comparison: Comparison | None) -> tuple[str, str]:
    return ("", "") if comparison is None else (f"{comparison.debiased_cka_r:.3f}", f"{comparison.overlap:.1%}")


def _per_sample(index: Tensor) -> float:
    """Mean number of neighbors in the rows [N, k] of a comparison."""
    return float((index >= 0).sum(dim=1).double().mean())


def _plain(stage: Stage) -> dict[str, object]:
    """Of the comparison with the kernel before: everything; of that with the last: what the picture shows."""
    nan, change, last = float("nan"), stage.change, stage.to_last
    moved = (nan, nan) if change is None else tuple(_per_sample(index) for index in (change.gained, change.lost))
    return {
        "kernel": stage.name,
        "mean_loss": stage.mean_loss,
        "purity": stage.purity,
        "above_floor": stage.above_floor,
        "verdict": stage.verdict,
        **{name: nan if change is None else getattr(change, name) for name in CHANGES},
        "gained": moved[0],
        "lost": moved[1],
        "last_debiased_cka_r": nan if last is None else last.debiased_cka_r,
        "last_overlap": nan if last is None else last.overlap,
    }
