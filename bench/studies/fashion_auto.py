"""Are the automatic settings right on a real network?  Fashion-MNIST: against a run ten times as long, tuned by hand.

    python -m bench.studies.fashion_auto --out docs/fashion_auto.md [--work FOLDER] [--checkpoint FILE]

Both runs sample one law, the automatic run's (n_beta, localization). The long one has ten times its draws, another
seed and another sampler: kinetic Langevin dynamics with a short step, wide spacing and noise kept low by a
control variate. The correlation of the two kernels' entries is put beside its ceiling: what two kernels of these
reliabilities can correlate at all, where reliability is that of halves of the chains, Spearman-Brown corrected. Then
the automatic settings with lr x 0.1, 1 and 30 and their verdicts.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import lossk
from bench.machine import described, processor
from bench.studies.time_to_truth_ours import CLOCKS
from bench.studies.time_to_truth_statistics import entries, reliability
from lossk import provenance
from lossk.diagnostics.diagnostics import diagnose
from lossk.forms.watched import watched_samples
from lossk.pilot.pilot import Pilot
from lossk.recipes import fashion

CHAINS = 4
TIMES = {"wall": "on a machine with nothing else to do", "cpu": "of the processor's time"}
LONGER = 10


def verdict_of(saved: dict[str, Any]) -> tuple[str, str]:
    """(verdict, advice) of a run of SGLD, from its traces and what its pilot measured."""
    losses, meta = saved["losses"], saved["meta"]
    found = diagnose(
        mean_loss=losses.double().mean(dim=2),
        watched=losses[:, :, watched_samples(losses.shape[2], losses.shape[0] * losses.shape[1])],
        dead_share=0.0,
        noise_floor=float(lossk.LossKernel.from_traces(lossk.LossTraces(losses)).neighbors(1).noise_floor.median()),
        excess=None,
        n_beta=None,
        criteria=None,
        pilot=Pilot(**meta["pilot"]),
        sampler=lossk.SGLD(**meta["sampler"]),
    )
    return found.verdict, found.advice


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("fashion_auto"), help="folder for traces; finished ones stay")
    parser.add_argument("--checkpoint", type=Path, help="the network, read or written; else it is trained")
    parser.add_argument("--num-probe", type=int, default=1000)
    parser.add_argument("--num-draws", type=int, default=50)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: the processor's, on a busy machine")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    task = fashion.make_task(num_probe=options.num_probe, checkpoint=options.checkpoint)
    sha = provenance.git_sha()

    def run(name: str, sampler: lossk.SGLD | lossk.BAOAB, **changes: Any) -> dict[str, Any]:
        path = options.work / f"{name}.pt"
        if not path.exists():
            began = CLOCKS[options.clock]()
            arguments: dict[str, Any] = {"num_chains": CHAINS, "num_draws": options.num_draws, "seed": 0, **changes}
            traces = lossk.sample_losses(
                task.model, task.samples, train=task.train, sampler=sampler, progress=False, **arguments
            )
            meta = json.dumps(traces.meta, default=str)
            torch.save({"losses": traces.losses, "meta": meta, "seconds": CLOCKS[options.clock]() - began}, path)
        saved = torch.load(path, weights_only=True)
        print(name, f"{saved['seconds']:.0f} s", flush=True)
        return {**saved, "meta": json.loads(saved["meta"])}

    auto = run("auto", lossk.SGLD())
    chosen = auto["meta"]["sampler"]
    steps = chosen["num_burnin_steps"] + options.num_draws * chosen["num_steps_bw_draws"]
    measured = Pilot(**auto["meta"]["pilot"])
    a_max = measured.stiffest(chosen["localization"])
    by_hand = lossk.BAOAB(
        n_beta=chosen["n_beta"],
        localization=chosen["localization"],
        step_size=0.5 * a_max**-0.5,
        friction=2.0 * chosen["localization"] ** 0.5,
        num_burnin_steps=60,
        num_steps_bw_draws=8,
        batch_size=256,
    )
    draws = LONGER * options.num_draws
    long = run("long", by_hand, num_draws=draws, seed=1)
    long_steps = by_hand.steps(draws)

    rows = []
    trust = {"auto": reliability(auto["losses"]), "long": reliability(long["losses"])}
    likeness = entries(auto["losses"]).likeness(entries(long["losses"]))
    for name in ("K", "R"):
        a, b = trust["auto"][name], trust["long"][name]
        rows.append((name, likeness[name], (a * b) ** 0.5, a, b))

    verdicts = [(1.0, *verdict_of(auto))]
    for factor in (0.1, 30.0):
        sampler = lossk.SGLD(**{**chosen, "lr": chosen["lr"] * factor})
        try:
            found = verdict_of(run(f"lr x {factor}", sampler, num_draws=options.num_draws // 2))
        except lossk.DivergedError as error:
            found = ("diverged", str(error))
        verdicts.append((factor, *found))
        print(verdicts[-1], flush=True)
    lines = [
        "# Fashion-MNIST: the automatic settings against a longer run tuned by hand",
        "",
        f"`python -m bench.studies.fashion_auto --out docs/fashion_auto.md`, {options.num_probe:,} test images, "
        f"{CHAINS} chains, 1 thread. Entries above the diagonal. "
        "The ceiling is the geometric mean of the two reliabilities "
        "(halves of the chains, Spearman-Brown corrected).",
        "",
        "| entries | correlation, automatic with long run | ceiling | reliability, automatic | reliability, long |",
        "|---|--:|--:|--:|--:|",
        *(f"| {name} | {r:.3f} | {top:.3f} | {a:.3f} | {b:.3f} |" for name, r, top, a, b in rows),
        "",
        f"Automatic: {CHAINS} x {options.num_draws} draws, {CHAINS * steps:,} steps, {auto['seconds']:.0f} s with "
        f"its pilot; long: {CHAINS} x {draws} draws of BAOAB, {CHAINS * long_steps:,} steps, "
        f"{long['seconds']:.0f} s ({TIMES[options.clock]}).",
        "",
        "What the pilot said:",
        "",
        *(f"    {reason}" for reason in auto["meta"]["reasons"]),
        "",
        "The same settings with another lr, burn-in and spacing kept:",
        "",
        "| lr times | verdict | the number behind it, and the change suggested |",
        "|--:|---|---|",
        *(f"| {factor:g} | {verdict} | {advice} |" for factor, verdict, advice in sorted(verdicts)),
        "",
        f"{processor()}; {described(provenance.versions())}; git {sha}.",
    ]
    options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
