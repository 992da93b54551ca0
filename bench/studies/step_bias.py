"""From which step on does a chain draw from another law, and does the verdict know?  Two MLPs, multiples of their step.

    python -m bench.studies.step_bias --out docs/step_bias.md [--networks digits multitask] [--seconds 12]

All sample the law that lossk's defaults choose. The reference is a long run of `lossk.BAOAB` at half its own step.
Likeness is Pearson's correlation of kernel entries above the diagonal; divided by the square root of both reliabilities
(halves of the chains, Spearman-Brown) it is what endless runs would show: 1 for the right law. And the two largest
eigenvalues that the verdict goes by, over few samples as it takes them and over all.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lossk
from bench.machine import described, processor
from bench.markdown import table
from bench.studies.time_to_truth_networks import NETWORKS, Network
from bench.studies.time_to_truth_ours import NUM_CHAINS, find_law, make_reference, timed
from bench.studies.time_to_truth_statistics import MEASURES, entries, reliability
from lossk import provenance
from lossk.curvature import curvature
from lossk.data.reading import read_samples
from lossk.diagnostics.verdict import STABILITY_LIMIT
from lossk.pilot.pilot import Pilot
from lossk.probe.anchor import evaluate_anchor
from lossk.samplers.chain import Surroundings
from lossk.samplers.sgld import AVERAGED, SGLDChain
from lossk.task.losses import resolve_loss
from lossk.task.task import Task
from lossk.timings import Timings

FACTORS = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0)
SEED = 11
SUBSETS = (32, 64, 128, 256)
DRAWS = 20  # at which subsets are compared with all samples
EVERY = 10  # draws


def run_at(network: Network, chosen: dict[str, Any], factor: float, seconds: float) -> Any:
    """Traces of the automatic settings at a multiple of their step, of about so many seconds."""
    thinning = max(1, round(chosen["num_steps_bw_draws"] / factor))
    burnin = math.ceil(chosen["num_burnin_steps"] / factor)
    changes = {"lr": chosen["lr"] * factor, "num_steps_bw_draws": thinning, "num_burnin_steps": burnin}
    sampler = lossk.SGLD(**{**chosen, **changes, "integrator": AVERAGED})
    settings: dict[str, Any] = {"num_chains": NUM_CHAINS, "seed": SEED, "clock": "cpu"}
    few, many = (timed(network, sampler, num_draws=draws, **settings)[1] for draws in (4, 24))
    draws = max(20, int((seconds - few) / max((many - few) / 20, 1e-4)))
    return timed(network, sampler, num_draws=draws, **settings)[0]


def by_subsets(network: Network, chosen: dict[str, Any]) -> dict[str, Tensor]:
    """{"curvature" and "gradient variance": [draws, subset sizes, alone or held out]}, in units of all samples' own."""
    train = read_samples(network.train, "train")
    measures = {"curvature": curvature.largest_curvature, "gradient variance": curvature.gradient_variance}
    found: dict[str, list[list[list[float]]]] = {name: [] for name in measures}
    with Task(network.model, resolve_loss("cross_entropy")) as task:
        losses, _ = evaluate_anchor(task, train, Timings())
        around = Surroundings(task, train, losses, SEED, "torch", Timings(), fitted={})

        def shares(measure: Callable[..., float], which: int) -> list[list[float]]:
            whole = measure(task, train, seed=SEED, most=len(train))
            over = partial(measure, task, train, seed=SEED, which=which)
            return [[over(most=m, held_out=held_out) / whole for held_out in (False, True)] for m in SUBSETS]

        sampler = lossk.SGLD(**{**chosen, "control_variate": False})
        for draw in SGLDChain(around, sampler, 0).run(DRAWS * EVERY):
            if draw is not None and (draw.draw + 1) % EVERY == 0:
                for name, measure in measures.items():
                    found[name].append(shares(measure, draw.draw))
    return {name: torch.tensor(values) for name, values in found.items()}


def section(name: str, seconds: float, reference_seconds: float) -> list[str]:
    """Of one network."""
    network = NETWORKS[name](None)
    law = find_law(network)
    reference = make_reference(network, law, reference_seconds, "cpu")
    auto = timed(network, None, num_chains=NUM_CHAINS, num_draws=4, seed=0)[0].meta
    chosen, pilot = auto["sampler"], Pilot(**auto["pilot"])
    at_anchor = dataclasses.replace(pilot, drawn_curvature=None, drawn_times=0)
    rows = []
    for factor in FACTORS:
        sampler = lossk.SGLD(**{**chosen, "lr": chosen["lr"] * factor})
        heads = [f"{factor:g}", f"{float(sampler.lr):.2g}", f"{at_anchor.stability_share(sampler):.0%}"]
        try:
            traces = run_at(network, chosen, factor, seconds)
        except lossk.DivergedError:
            rows.append([*heads, "", "diverged", "", "", ""])
            continue
        share = Pilot(**traces.meta["pilot"]).stability_share(sampler)
        losses = traces.losses
        trust, likeness = reliability(losses), entries(losses).likeness(reference.entries)
        known = [likeness[m] / math.sqrt(trust[m] * reference.reliability[m]) for m in MEASURES]
        verdict = "too large" if share > STABILITY_LIMIT else "good"
        draws = f"{losses.shape[0]} x {losses.shape[1]}"
        rows.append([*heads, f"{share:.0%}", verdict, *(f"{value:.3f}" for value in known), draws])
        print(name, rows[-1], flush=True)
    lines = [
        f"## {name}",
        "",
        f"{network.what}, n_beta {law.n_beta:.4g}, localization {law.localization:.4g}. Reference: "
        f"{reference.num_chains} chains x {reference.num_draws} draws of `lossk.BAOAB`, reliability "
        f"{reference.reliability['R']:.3f} (R), {reference.reliability['K']:.3f} (K).",
        "",
        table(
            ("times the step", "lr", "of the stability limit at w\\*", "at the run's own draws", "verdict on the step",
             "likeness, R", "K", "draws"),
            rows,
        ),
        "",
    ]  # fmt: skip
    for what, found in by_subsets(network, chosen).items():
        mean, deviation = found.mean(dim=0), found.std(dim=0)
        cells = [[f"{mean[i, j]:.2f} ± {deviation[i, j]:.2f}" for j in range(2)] for i in range(len(SUBSETS))]
        lines += [
            f"Largest {what} at {DRAWS} draws, over that of all {len(network.train[1]):,} training samples there "
            "(mean ± standard deviation over draws):",
            "",
            table(
                ("samples", "their own", "with as many held out"),
                [[str(m), *row] for m, row in zip(SUBSETS, cells, strict=True)],
            ),
            "",
        ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--networks", nargs="+", choices=tuple(NETWORKS), default=["digits", "multitask"])
    parser.add_argument("--seconds", type=float, default=12.0, help="of each run (default %(default)s)")
    parser.add_argument("--reference", type=float, default=100.0, help="seconds of the reference (default %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "# Steps and the law they draw from",
        "",
        "`python -m bench.studies.step_bias --out docs/step_bias.md`: the automatic settings at multiples of their "
        "step, against a long run of another sampler. "
        "Likeness with the noise of both runs taken out: 1 is the right law.",
        "",
        "A step that looks moderate at w\\* can be near or beyond the limit where the draws are. So a trial chain "
        "measures the curvature at its draws, and every run again at its chains' last ones, for the verdict: a step is "
        f"too large above {STABILITY_LIMIT:.0%} of the stability limit there, from where on some draws are steeper "
        "than it is stable for and nothing vouches for the law: it may still be right, or not.",
        "",
        "Over few samples the largest eigenvalue comes out too large. The verdict takes the middle of theirs and of "
        "what their eigenvector has over as many others.",
        "",
    ]  # fmt: skip
    for name in options.networks:
        lines += section(name, options.seconds, options.reference)
        machine = f"{processor()}; {described(provenance.versions())}; git {provenance.git_sha()}."
        options.out.write_text("\n".join([*lines, machine]) + "\n")  # what is there so far is kept


if __name__ == "__main__":
    main()
