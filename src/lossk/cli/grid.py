"""A grid over n_beta and localization: a short run in each cell, and what it says of the setting.

A grid is a folder: `grid.json` holds what was asked for and every cell's settings, resolved by one pilot; each cell's
result is a JSON file of its own, which appears in one step when the cell is done. Anything unfinished is done again.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lossk.checks import check_integer
from lossk.cli.config import RunConfig
from lossk.cli.grid_cell import PlannedCell, grid_data
from lossk.pilot.automatic import choose_settings
from lossk.run.prepare import prepare
from lossk.run.run import resolve
from lossk.samplers.samplers import kind_of, read_sampler
from lossk.samplers.sgld import SGLD

FORMAT = 1
N_BETA_FACTORS = (0.1, 1.0, 10.0)
LOCALIZATION_FACTORS = (0.1, 10**-0.5, 1.0, 10**0.5, 10.0)
FROM_BUILD = ("backend", "device", "precision", "seed")  # of a config's `build`, what a cell takes over


@dataclass(frozen=True, kw_only=True)
class GridSettings:
    """How each cell is run.

    Args:
        num_chains, num_draws: of a cell's run; enough for R-hat and for the 50 effective draws that "good" asks for.
        probe: most probe samples, the same share of every class, or evenly spaced where there are no labels.
        max_steps: most SGLD steps per chain. A cell that would need more burns in and thins less, and is judged so.
    """

    num_chains: int = 4
    num_draws: int = 40
    probe: int = 512
    max_steps: int = 5000

    def __post_init__(self) -> None:
        check_integer("num_chains", self.num_chains, 2)
        check_integer("num_draws", self.num_draws, 4)
        check_integer("probe", self.probe, 2)
        check_integer("max_steps", self.max_steps, 2 * self.num_draws)


def request_of(config: RunConfig, settings: GridSettings) -> dict[str, Any]:
    """What determines a cell's result, beside its n_beta and localization; compared on resuming."""
    request = {
        "format": FORMAT,
        "task": config.task,
        "task_args": dict(config.task_args),
        "sampler": {key: value for key, value in config.sampler.items() if key not in ("n_beta", "localization")},
        "build": {key: config.build[key] for key in FROM_BUILD if key in config.build},
        **dataclasses.asdict(settings),
    }
    return json.loads(json.dumps(request, default=str))  # as it will be read back


def parse_values(name: str, texts: Sequence[str] | None) -> list[list[Any]] | None:
    """["30", "2x"] -> [[30.0, False], [2.0, True]]: numbers, and multiples of the middle of the grid.

    Raises:
        ValueError: not positive finite numbers, or given twice.
    """
    if texts is None:
        return None
    values: list[list[Any]] = []
    for text in texts:
        try:
            value = float(text.removesuffix("x"))
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be numbers greater than 0, or multiples like 10x, got {text!r}")
        values.append([value, text.endswith("x")])
    if not values or any(value in values[:i] for i, value in enumerate(values)):
        raise ValueError(f"{name} must be different numbers, at least one, got {' '.join(texts)!r}")
    return values


def plan_grid(
    config: RunConfig,
    settings: GridSettings,
    n_beta: Sequence[Sequence[Any]] | None,
    localization: Sequence[Sequence[Any]] | None,
) -> dict[str, Any]:
    """The grid as plain data, ready for `grid.json`: one pilot, then every cell's settings, steps and seconds.

    `n_beta` and `localization` are as `parse_values` gives them; None is 3 and 5 values around the middle, which is
    what the config asks for, as the pilot fills it in.
    """
    task = config.make_task()
    probe, _, train = grid_data(task, settings.probe)
    build = {key: config.build.get(key) for key in FROM_BUILD}
    asked = read_sampler(config.sampler)
    if not isinstance(asked, SGLD):
        raise ValueError(f"lossk tune needs sampler.kind: sgld in the config, got {kind_of(asked)!r}")
    prepared = prepare(
        task.model, probe, train, task.loss, asked, settings.num_chains, settings.num_draws,
        build["backend"] or "auto", build["device"], build["precision"], build["seed"] or 0, task.transform,
    )  # fmt: skip
    with prepared.task:
        run = resolve(prepared, None)
        assert run.pilot is not None
        middle = run.sampler
        assert isinstance(middle, SGLD)
        if float(middle.localization) == 0.0:
            raise ValueError("localization must be greater than 0 or 'auto' in the config of a grid, got 0")
        step_seconds = run.time_a_step()
        probe_seconds = run.pass_seconds * run.probe.num_samples
        cells = []
        for strength in _values(n_beta, N_BETA_FACTORS, float(middle.n_beta or 0)):
            pilot = dataclasses.replace(run.pilot, n_beta=strength)
            for pull in _values(localization, LOCALIZATION_FACTORS, float(middle.localization)):
                chosen = dataclasses.replace(asked, n_beta=strength, localization=pull)
                chosen, _ = choose_settings(chosen, pilot, run.task, num_train=len(run.train))
                cells.append(_fit(chosen, settings, step_seconds, probe_seconds))
    return {
        "request": request_of(config, settings),
        "title": task.notes.splitlines()[0] if task.notes else config.task,
        "given": {"n_beta": n_beta, "localization": localization},
        "middle": {"n_beta": rounded(float(middle.n_beta or 0)), "localization": rounded(float(middle.localization))},
        "num_weights": run.task.num_weights,
        "num_probe": len(run.probe),
        "fingerprints": run.fingerprints,
        "cells": [dataclasses.asdict(cell) for cell in cells],
    }


def _values(given: Sequence[Sequence[Any]] | None, factors: Sequence[float], middle: float) -> list[float]:
    pairs = [(factor, True) for factor in factors] if given is None else given
    return sorted({rounded(value * (middle if relative else 1.0)) for value, relative in pairs})


def rounded(value: float) -> float:
    """To four digits: settings are then printed, and named in files, as they are."""
    return float(f"{value:.4g}")


def _fit(sampler: SGLD, settings: GridSettings, step_seconds: float, probe_seconds: float) -> PlannedCell:
    """A cell within `max_steps` per chain: at most half of them burn in, the rest is shared among the draws."""
    draws, most = settings.num_draws, settings.max_steps
    burnin, thinning = int(sampler.num_burnin_steps), int(sampler.num_steps_bw_draws)
    wanted = burnin + draws * thinning
    if wanted > most:
        burnin = min(burnin, max(most // 2, most - draws * thinning))
        thinning = max(1, min(thinning, (most - burnin) // draws))
        sampler = dataclasses.replace(sampler, num_burnin_steps=burnin, num_steps_bw_draws=thinning)
    steps = burnin + draws * thinning
    seconds = settings.num_chains * (steps * step_seconds + draws * probe_seconds)
    return PlannedCell(sampler=sampler.to_dict(), steps_wanted=wanted, steps=steps, seconds=seconds)


def planned_cells(grid: Mapping[str, Any]) -> list[PlannedCell]:
    """The cells of a grid, columns of one n_beta after the other, localization ascending."""
    return [PlannedCell(**plain) for plain in grid["cells"]]
