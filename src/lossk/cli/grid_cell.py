"""One cell of a grid: its probe, its run, its result as plain data."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lossk.analysis.purity import chance_purity, class_purity
from lossk.build import build_kernel
from lossk.data.data import Samples
from lossk.data.reading import read_samples
from lossk.disk.files import read_json
from lossk.errors import DivergedError, StoreError
from lossk.recipes import RecipeTask
from lossk.samplers.sgld import SGLD

NEIGHBORS = 10
Data = tuple[Any, Tensor | None, Any]  # probe samples, their labels [n] or None, training samples


@dataclass(frozen=True, kw_only=True)
class PlannedCell:
    """One cell before it is run."""

    sampler: dict[str, Any]  # resolved, as `SGLD.to_dict`
    steps_wanted: int  # per chain, by the pilot
    steps: int  # per chain, within max_steps
    seconds: float  # estimate

    @property
    def name(self) -> str:
        """Its file's name, without the ending."""
        return f"n_beta={self.sampler['n_beta']:g} localization={self.sampler['localization']:g}"


def grid_data(task: RecipeTask, most: int) -> Data:
    """(probe, labels, train) of a task, with at most `most` probe samples."""
    samples = read_samples(task.samples, "samples")
    index = choose_probe(len(samples), task.labels, most)
    train = _as_source(samples) if task.train is None else task.train  # the subset must not become the training data
    part = Samples(samples[index], len(index))
    return _as_source(part), None if task.labels is None else task.labels[index], train


def _as_source(samples: Samples) -> Any:
    """A tree of tensors in a form that `read_samples` takes."""
    if isinstance(samples.tree, Tensor):
        return DataLoader(list(samples.tree), batch_size=256)  # type: ignore[arg-type]
    return samples.tree


def choose_probe(num_samples: int, labels: Tensor | None, most: int) -> Tensor:
    """[min(N, most)] int64, ascending: the same share of every class, or evenly spaced without labels."""
    count = min(num_samples, most)
    positions = np.linspace(0, num_samples - 1, count).round().astype(np.int64)
    if labels is None:
        return torch.from_numpy(positions)
    by_class = np.argsort(labels.cpu().numpy(), kind="stable")
    return torch.from_numpy(np.sort(by_class[positions]))


def run_cell(cell: PlannedCell, grid: Mapping[str, Any], task: RecipeTask, data: Data) -> dict[str, Any]:
    """Run one cell; a chain that diverges is a verdict here, not an error.

    Returns:
        Plain data: the settings, the diagnostics (numbers in nats), and what the neighbors look like.
    """
    request, (probe, labels, train) = grid["request"], data
    started = time.perf_counter()
    result: dict[str, Any] = {**dataclasses.asdict(cell), "request": request}
    try:
        kernel = build_kernel(
            task.model,
            probe,
            train=train,
            loss=task.loss,
            transform=task.transform,
            sampler=SGLD(**cell.sampler),
            num_chains=request["num_chains"],
            num_draws=request["num_draws"],
            tile=512,
            progress=False,
            **request["build"],
        )
    except DivergedError as error:
        result.update(verdict="diverged", advice=str(error))
    else:
        if kernel.meta["config"]["fingerprints"] != grid["fingerprints"]:
            raise StoreError("the task gives another model or other data than when the grid began; use --overwrite")
        diagnostics = kernel.diagnostics
        assert diagnostics is not None
        neighbors = kernel.neighbors(min(NEIGHBORS, kernel.num_samples - 1))
        excess = torch.tensor(kernel.meta["excess_trace"], dtype=torch.float64, device="cpu")
        result.update(
            diagnostics.to_dict(),
            rise=float(excess.mean()),  # of the training loss over its value at w*, nats
            rise_bound=grid["num_weights"] / (2.0 * float(cell.sampler["n_beta"])),  # every direction regular and free
            purity=None if labels is None else class_purity(neighbors.index, labels),
            chance=None if labels is None else chance_purity(labels),
        )
    result["seconds_taken"] = time.perf_counter() - started
    return result


def read_cell(folder: Path, cell: PlannedCell, grid: Mapping[str, Any]) -> dict[str, Any] | None:
    """A finished cell's result, or None when there is none for this request: absent, torn, or of another run."""
    try:
        result = read_json(folder / f"{cell.name}.json")
    except (StoreError, UnicodeDecodeError):
        return None
    fits = isinstance(result, dict) and result.get("request") == grid["request"] and "seconds_taken" in result
    return result if fits else None
