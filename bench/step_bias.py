"""From which step on does a chain draw from another law?  The digits MLP, automatic steps and multiples of them.

    python -m bench.step_bias --out docs/step_bias.md [--seconds 12] [--reference 100]

All sample the law that lossk's defaults choose. The reference is a long run of `lossk.BAOAB` at half its own step.
Likeness is Pearson's correlation of kernel entries above the diagonal; divided by the square root of both reliabilities
(halves of the chains, Spearman-Brown) it is what endless runs would show: 1 for the right law.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch

import lossk
from bench.machine import described, processor
from bench.time_to_truth_networks import NETWORKS, Network
from bench.time_to_truth_ours import NUM_CHAINS, find_law, make_reference, timed
from bench.time_to_truth_statistics import MEASURES, entries, reliability
from lossk import provenance
from lossk.pilot import Pilot
from lossk.sgld import AVERAGED

FACTORS = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0)
SEED = 11


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=12.0, help="of each run (default %(default)s)")
    parser.add_argument("--reference", type=float, default=100.0, help="seconds of the reference (default %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    network = NETWORKS["digits"](None)
    law = find_law(network)
    reference = make_reference(network, law, options.reference, "cpu")
    auto = timed(network, None, num_chains=NUM_CHAINS, num_draws=4, seed=0)[0].meta
    chosen, pilot = auto["sampler"], Pilot(**auto["pilot"])
    localization = chosen["localization"]
    curvatures = (pilot.curvature, pilot.steepest(localization))
    stiff = [pilot.n_beta * curvature + localization for curvature in curvatures]
    rows = []
    for factor in FACTORS:
        lr = chosen["lr"] * factor
        shares = [f"{lr * most / 4:.0%}" for most in stiff]
        try:
            losses = run_at(network, chosen, factor, options.seconds).losses
        except lossk.DivergedError:
            rows.append([f"{factor:g}", f"{lr:.2g}", *shares, "diverged", "", ""])
            continue
        trust, likeness = reliability(losses), entries(losses).likeness(reference.entries)
        known = [likeness[m] / math.sqrt(trust[m] * reference.reliability[m]) for m in MEASURES]
        draws = f"{losses.shape[0]} x {losses.shape[1]}"
        rows.append([f"{factor:g}", f"{lr:.2g}", *shares, *(f"{value:.3f}" for value in known), draws])
        print(rows[-1], flush=True)
    lines = [
        "# Steps and the law they draw from",
        "",
        f"`python -m bench.step_bias --out docs/step_bias.md`: {network.what}, n_beta {law.n_beta:.4g}, localization "
        f"{law.localization:.4g}. Largest curvature of the training loss {curvatures[0]:.3g} at w\\*, "
        f"{curvatures[1]:.3g} at typical draws. Reference: {reference.num_chains} chains x "
        f"{reference.num_draws} draws of `lossk.BAOAB`, reliability {reference.reliability['R']:.3f} (R), "
        f"{reference.reliability['K']:.3f} (K). Likeness with the noise of both runs taken out: 1 is the right law.",
        "",
        "| times the step | lr | of the stability limit at w\\* | at the draws | likeness, R | K | draws |",
        "|--:|--:|--:|--:|--:|--:|--:|",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        "A step that looks moderate at w\\* can be near or beyond the limit where the draws are. So the pilot measures "
        "both, and so does a run whose settings are numbers, for its verdict.",
        "",
        f"{processor()}; {described(provenance.versions())}; git {provenance.git_sha()}.",
    ]  # fmt: skip
    options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
