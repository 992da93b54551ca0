"""`lossk tune`: a grid over n_beta and localization, its table, its recommendation, its picture."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lossk.cli.config import RunConfig, load_config, parse_override
from lossk.cli.grid import GridSettings, parse_values, plan_grid, planned_cells, request_of
from lossk.cli.grid_cell import PlannedCell, read_cell
from lossk.cli.grid_jobs import PICTURE, open_grid, run_grid, working_in
from lossk.optional import check_installed
from lossk.report.grid_picture import draw_grid, number
from lossk.timings import duration

RISE_LIMIT = 0.5  # nats


def run_tune(options: argparse.Namespace) -> None:
    settings = GridSettings(
        num_chains=options.num_chains, num_draws=options.num_draws, probe=options.probe, max_steps=options.max_steps
    )
    n_beta = parse_values("--n-beta", options.n_beta)
    localization = parse_values("--localization", options.localization)
    config = load_config(options.config, dict(parse_override(text) for text in options.set))
    folder = Path(config.out).with_suffix(".tune") if options.out is None else Path(options.out)
    check_installed("matplotlib", "demo", "lossk tune")

    with working_in(folder, resume=options.resume, overwrite=options.overwrite):
        grid = open_grid(
            folder,
            request_of(config, settings),
            {"n_beta": n_beta, "localization": localization},
            lambda: _plan(config, settings, n_beta, localization),
            overwrite=options.overwrite,
        )
        results = _results(folder, config, grid, options.jobs)
        print(table(results))
        best, reason = recommend(results)
        print(reason)
        if best is not None:
            print(f"  lossk run {options.config} {_settings_of(best)}")
        picture = folder / PICTURE
        draw_grid(results, picture, title="Which sampler settings can be trusted?",
                  subtitles=[grid["title"], _subtitle(grid)], middle=grid["middle"], recommended=best)  # fmt: skip
        print(f"wrote {picture}")


def _results(folder: Path, config: RunConfig, grid: Mapping[str, Any], jobs: int) -> list[dict[str, Any]]:
    """Every cell's, with a bar."""
    cells = planned_cells(grid)
    print(grid["title"])
    print(_announcement(folder, grid, cells, jobs))
    with tqdm(total=len(cells), desc="tuning", unit="cell", dynamic_ncols=True) as bar:
        bar.update(sum(read_cell(folder, cell, grid) is not None for cell in cells))

        def finished(cell: PlannedCell, result: Mapping[str, Any]) -> None:
            bar.set_postfix_str(f"{cell.name}: {result['verdict']}", refresh=False)
            bar.update()

        try:
            return run_grid(folder, config, grid, cells, jobs=jobs, finished=finished)
        except KeyboardInterrupt:
            bar.close()
            done = sum(read_cell(folder, cell, grid) is not None for cell in cells)
            print(f"{done} of {len(cells)} cells are finished; the same command with --resume continues")
            raise


def _plan(config: RunConfig, settings: GridSettings, n_beta: Any, localization: Any) -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the jobs: another number of threads may train another network
    try:
        return plan_grid(config, settings, n_beta, localization)
    finally:
        torch.set_num_threads(threads)


def _announcement(folder: Path, grid: Mapping[str, Any], cells: Sequence[PlannedCell], jobs: int) -> str:
    todo = [cell for cell in cells if read_cell(folder, cell, grid) is None]
    done, request = len(cells) - len(todo), grid["request"]
    # Jobs share the cells, but no cell is shared.
    seconds = max(sum(cell.seconds for cell in todo) / jobs, max((cell.seconds for cell in todo), default=0.0))
    cut = sum(cell.steps < cell.steps_wanted for cell in cells)
    lines = [
        f"{len(cells)} cells of {request['num_chains']} chains x {request['num_draws']} draws on {grid['num_probe']} "
        f"samples" + (f", {done} already finished" if done else ""),
        f"  middle: n_beta {grid['middle']['n_beta']:g}, localization {grid['middle']['localization']:g}",
    ]
    if todo:
        lines.append(f"  about {duration(seconds)} with {jobs} job{'s' * (jobs > 1)}, beside making the task")
    if cut:
        lines.append(f"  {cut} cells want more than {request['max_steps']} steps per chain and get no more than that")
    return "\n".join(lines)


def _subtitle(grid: Mapping[str, Any]) -> str:
    request = grid["request"]
    return (
        f"{grid['num_probe']} probe samples   |   {request['num_chains']} chains x {request['num_draws']} draws   |   "
        f"at most {request['max_steps']:,} steps per chain"
    )


def _settings_of(result: Mapping[str, Any]) -> str:
    sampler = result["sampler"]
    return f"--set sampler.n_beta={sampler['n_beta']:g} --set sampler.localization={sampler['localization']:g}"


def recommend(results: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any] | None, str]:
    """The least local setting that still samples what it claims to, and the reason in words."""
    good = [result for result in results if result["verdict"] == "good"]
    within = [result for result in good if result["rise"] <= RISE_LIMIT]
    if not good:
        return None, "recommended: none; no cell is good (see the advice above)"
    if not within:
        return None, f"recommended: none; every good cell raises the training loss by more than {RISE_LIMIT:g} nats"
    best = max(within, key=lambda result: result["rise"])
    reason = (
        f"recommended: n_beta {best['sampler']['n_beta']:g}, localization {best['sampler']['localization']:g}: of the "
        f"{len(within)} good cells whose draws raise the training loss by at most {RISE_LIMIT:g} nats, it raises it "
        f"most ({best['rise']:.3g}), so it sees furthest around the trained weights"
    )
    lowest = min(result["sampler"]["localization"] for result in results)
    if best["sampler"]["localization"] == lowest:
        reason += "; it is at the grid's edge, and lower values of --localization may do as well"
    return best, reason


COLUMNS = (
    "n_beta", "localization", "lr", "burn-in", "thin", "verdict", "R-hat", "ESS", "LLC", "+-", "rise", "noise",
    "bias", "R rel.", "floor", "purity", "seconds",
)  # fmt: skip


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Aligned plain text: a line per cell, then what to change where something is wrong."""
    rows = [COLUMNS, *(_row(result) for result in results)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    left = COLUMNS.index("verdict")
    lines = [
        "  ".join(text.ljust(widths[i]) if i == left else text.rjust(widths[i]) for i, text in enumerate(row)).rstrip()
        for row in rows
    ]
    for result in results:
        if result["verdict"] != "good":
            sampler = result["sampler"]
            lines.append(
                f"  ({sampler['n_beta']:g}, {sampler['localization']:g}) {result['verdict']}: {result['advice']}"
            )
    return "\n".join(lines)


def _row(result: Mapping[str, Any]) -> tuple[str, ...]:
    sampler, value = result["sampler"], {**dict.fromkeys(("rise", "purity", "noise_floor", "rhat", "ess", "llc",
        "llc_se", "gradient_noise_ratio", "foreseen_bias", "reliability")), **result}  # fmt: skip
    return (
        f"{sampler['n_beta']:g}", f"{sampler['localization']:g}", f"{sampler['lr']:.2g}",
        str(sampler["num_burnin_steps"]), str(sampler["num_steps_bw_draws"]), result["verdict"],
        number(value["rhat"], 2), number(value["ess"], 0), number(value["llc"], 3, "g"),
        number(value["llc_se"], 1, "g"),
        number(value["rise"], 2, "g"), number(value["gradient_noise_ratio"], 2), number(value["foreseen_bias"], 3),
        number(value["reliability"], 2), number(value["noise_floor"], 2), number(value["purity"], 3),
        f"{result['seconds_taken']:.1f}",
    )  # fmt: skip
