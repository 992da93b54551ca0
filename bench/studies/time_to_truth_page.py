"""The page of `bench.studies.time_to_truth`, from its record alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

CLOCKS = {
    "wall": "**Seconds** are the wall's.",
    "cpu": "**Seconds** are the processor's, not the wall's, because the machine had other work to do.",
}

HOW = """\
How it is measured:

- **Same law, same data.** All sample exp(-n_beta L_n(w) - localization/2 |w - w*|^2) with the n_beta and localization
  that lossk's defaults choose for the network, minibatches of 256, from the same trained weights; the kernel is that of
  the same samples. One thread each, one process after the other.
- {clock}
- **The truth** is a long run of `lossk.BAOAB` at half its automatic step (or, where that is said, the long run of
  `bench.studies.fashion_auto`, tuned by hand) and with other noise. Its
  reliability, from two halves of its chains (Spearman-Brown), is stated: a perfect kernel would show the square root
  of it. The correlation is Pearson's, over the entries above the diagonal: of R (the correlation kernel, in which every
  sample weighs alike) for the headline, of K beside it.
- **lossk's seconds** begin with the call, cold: reading, pilot, tuning, burn-in. 4 chains, its default. A run of two
  draws per chain and a long one are timed; the time of d draws lies on the line between them.
- **devinterp's seconds** begin with the call of its `sample`. Imports, and what torch loads on first use, are free on
  both sides. It gets what an experienced user would give it: batch norm frozen, losses a thousand samples at a time and
  without cancellation, on the grid also a loader that slices whole minibatches, no measurement of the initial loss, and
  the quicker of its two SGLD classes. Every draw is timed where it happens. Each kernel is centered by chain and
  pooled, and the better of the two counts.
- Neither side is charged for the product that turns traces into a kernel.
- **Defaults, our law**: step 0.01, 10 chains, a draw at every step, no burn-in, torch's loader; only n_beta and
  localization are given, and the draws go on past its default of 100 per chain while the time allows.
- **Wholly default** is its 100 draws at its own law. That law is improper, for nothing localizes it (localization 0):
  there is no kernel of its own to reach, and the likeness to ours is stated for orientation.
- **Grid**: 20 points, lossk's step times 0.1, 0.3, 1, 3, 10 and 1, 5, 20, 50 steps between draws; 4 chains; the first
  fifth of the steps is burn-in, whose losses are not charged for. Finding the best point is not charged either. How
  long a point runs is stated with each network; if none is there by then, the three likest run longer.
"""


def page(record: Mapping[str, Any]) -> str:
    """Markdown."""
    networks = record["networks"]
    levels = {network["level"] for network in networks.values()}
    level = f"{levels.pop():g}" if len(levels) == 1 else "as much as is stated"
    with_peer = any("peer" in network for network in networks.values())
    lines = [
        "# Time to truth",
        "",
        f"Seconds until the entries of a kernel correlate {level} with those of a long reference run.",
        "",
    ]
    if with_peer:
        lines += _headline(networks)
    else:
        lines += ["devinterp was not there to be measured: give `--peer-python` a Python that has devinterp 1.3.2.", ""]
    for name, network in networks.items():
        lines += _network(name, network)
    lines += [HOW.format(clock=CLOCKS[record["clock"]])]
    lines += [_made_by(record), ""]
    return "\n".join(lines)


def _headline(networks: Mapping[str, Any]) -> list[str]:
    lines = [
        "How many times sooner lossk is there (R; targets: at least 10 and 3):",
        "",
        "| network | lossk default | devinterp at its defaults, our law | devinterp's best grid point |",
        "|---|--:|--:|--:|",
    ]
    for name, network in networks.items():
        if "peer" not in network:
            continue
        ours, peer = network["ours"][0], network["peer"]
        cells = [_against(ours, other) for other in (peer["defaults"], best(peer["grid"]))]
        lines.append(f"| {name} | {_time(ours)} | {cells[0]} | {cells[1]} |")
    return [*lines, ""]


def _network(name: str, network: Mapping[str, Any]) -> list[str]:
    reference, law = network["reference"], network["law"]
    lines = [
        f"## {name}",
        "",
        f"{network['what']}; kernel of {network['num_samples']:,} samples, {network['num_train']:,} training samples; "
        f"n_beta {law['n_beta']:.4g}, localization {law['localization']:.4g}. "
        f"Reference: {reference['num_chains']} chains x {reference['num_draws']} draws, {reference['seconds']:.0f} s, "
        f"step {reference['settings']['step_size']:.2g}, {reference['settings']['num_steps_bw_draws']} steps a draw, "
        f"reliability of R {reference['reliability']['R']:.4f}, of K {reference['reliability']['K']:.4f}"
        f"{' (the long run of bench.studies.fashion_auto)' if network.get('runs') else ''}. "
        f"Level to reach: {network['level']:g}. git {network['git_sha']}.",
        "",
        "| sampler | lr | chains | steps between draws | seconds (R) | draws per chain | seconds (K) | reached R, K |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    rows = list(network["ours"])
    peer = network.get("peer")
    if peer is not None:
        rows += [{**peer["defaults"], "name": "devinterp, defaults, our law"}]
        top = best(peer["grid"])
        if top is not None:
            rows += [{**top, "name": "devinterp, best of the grid"}]
    lines += [_row(row) for row in rows]
    lines += [""]
    if peer is not None:
        wholly = peer["wholly"]
        at_end = f"likeness of R to our law's {_number(wholly['likeness'].get('R'))} " if wholly["likeness"] else ""
        costs = ", ".join(f"{method} {1e3 * cost['step']:.2f} ms" for method, cost in peer["costs"].items())
        lines += [
            f"devinterp wholly by default, 10 x {wholly['ran_draws'] or 100} draws: {at_end}({wholly['note']}). "
            f"One of its steps: {costs}; the losses of all samples {1e3 * peer['costs'][peer['method']]['losses']:.1f} "
            f"ms. Defaults at our law: {peer['defaults']['note']}. The grid ({peer['method']}), seconds for R:",
            "",
            *_grid(peer["grid"]),
            "",
            f"Every point ran for {network['budget']['short']:g} times lossk's time (no run longer than "
            f"{network['budget']['cap']:g} s); had none been there, the three likest would have run for "
            f"{network['budget']['long']:g} times it. The whole grid took "
            f"{sum(point['ran'] for point in peer['grid']):,.0f} s.",
            "",
        ]
    return lines


def _grid(points: list[Mapping[str, Any]]) -> list[str]:
    steps = sorted({point["settings"]["num_steps_bw_draws"] for point in points})
    lines = ["| lr | " + " | ".join(f"{value} steps" for value in steps) + " |", "|--:" * (len(steps) + 1) + "|"]
    for lr in sorted({point["settings"]["lr"] for point in points}):
        of_row = {p["settings"]["num_steps_bw_draws"]: p for p in points if p["settings"]["lr"] == lr}
        lines.append(f"| {lr:.2g} | " + " | ".join(_cell(of_row[value]) for value in steps) + " |")
    return lines


def best(points: list[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The grid point that is there first, or the likest if none is; None when all diverged."""
    there = [point for point in points if point["seconds"]["R"] is not None]
    if there:
        return min(there, key=lambda point: point["seconds"]["R"])
    ran = [point for point in points if point["likeness"].get("R") is not None]
    return max(ran, key=lambda point: point["likeness"]["R"]) if ran else None


def _row(result: Mapping[str, Any]) -> str:
    settings = result["settings"]
    lr = settings.get("lr")
    if not result["likeness"]:
        return f"| {result['name']} | {_short(lr)} | | | {result['note']} | | | |"
    reached = ", ".join(_number(result["likeness"][measure]) for measure in ("R", "K"))
    return (
        f"| {result['name']} | {_short(lr)} | {settings.get('num_chains', '')} | "
        f"{settings.get('num_steps_bw_draws', '')} | {_time(result)} | {result['draws']['R'] or ''} | "
        f"{_time(result, 'K')} | {reached} |"
    )


def _time(result: Mapping[str, Any] | None, measure: str = "R") -> str:
    if result is None or not result["likeness"]:
        return "never: it diverges"
    seconds = result["seconds"][measure]
    return f"> {result['ran']:.3g} s" if seconds is None else f"{seconds:.3g} s"


def _against(ours: Mapping[str, Any], other: Mapping[str, Any] | None) -> str:
    """ "12 x (40 s)", "> 12 x (> 40 s)" where the other never got there; no number where ours did not."""
    if other is None or not other["likeness"] or ours["seconds"]["R"] is None:
        return _time(other)
    theirs = other["seconds"]["R"]
    bound = "> " if theirs is None else ""
    return f"{bound}{(theirs or other['ran']) / ours['seconds']['R']:.3g} x ({_time(other)})"


def _cell(point: Mapping[str, Any]) -> str:
    if not point["likeness"]:
        return "diverged"
    if point["seconds"]["R"] is None:
        return f"> {point['ran']:.3g} ({_number(point['likeness']['R'])})"
    return f"{point['seconds']['R']:.3g}"


def _number(value: float | None) -> str:
    return "none" if value is None or math.isnan(value) else f"{value:.3f}"


def _short(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, float) else ""


def _made_by(record: Mapping[str, Any]) -> str:
    machine = record["environment"]
    versions = dict(record["versions"])
    for network in record["networks"].values():
        versions.update({f"peer's {k}": v for k, v in network.get("peer", {}).get("versions", {}).items()})
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"`python -m bench.studies.time_to_truth`: {machine['device']}, {machine['num_threads']} thread; {listed}; "
        f"seed {record['seed']}."
    )
