"""Time to truth: seconds until a kernel's entries correlate 0.95 with a long reference run's, lossk and devinterp 1.3.

    python -m bench.studies.time_to_truth [--peer-python PATH] [--out docs/time_to_truth.md] [--record FILE.json]

PATH is a Python that has devinterp 1.3.2; without it the peer is left out. One thread for everyone. How every number
is made is in the page that it writes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.sgld_step import environment
from bench.studies.time_to_truth_networks import NETWORKS, Network
from bench.studies.time_to_truth_ours import (
    CLOCKS,
    VARIANTS,
    Law,
    Reference,
    Result,
    Variant,
    find_law,
    make_reference,
    measure,
    saved_reference,
    saved_run,
)
from bench.studies.time_to_truth_page import page
from bench.studies.time_to_truth_peer import DEFAULTS, Peer, at_defaults, grid, measure_grid, outcome, wholly_default
from lossk import provenance
from lossk.ops import extension


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """How long everything may take."""

    level: float = 0.95
    reference: float = 600.0  # seconds of the reference, about
    ours: float = 300.0  # seconds of each of lossk's samplers, at most
    short: float = 3.5  # of every point of the grid, in times of ours
    long: float = 12.0  # of the defaults, and of the likest points when none got there, in times of ours
    cap: float = 600.0  # seconds of any one run of the peer, at most


def compare(
    network: Network,
    budget: Budget,
    *,
    variants: dict[str, Variant],
    peer: Callable[[Network], Peer] | None = None,
    seed: int = 0,
    clock: str = "wall",
    runs: Path | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """All of one network, as plain data: its law, its reference, and a result per sampler.

    Args:
        runs: folder of `bench.studies.fashion_auto`, whose long run then is the reference, and whose automatic run
            is ours.
    """
    say(f"{network.name}: {network.what}")
    ready = None if peer is None else peer(network)  # first: better to fail now than after the reference
    if runs is None:
        law = find_law(network, seed=seed)
        reference = make_reference(network, law, budget.reference, clock)
    else:
        law, reference = saved_reference(runs, network, seed=seed)
    say(
        f"  reference: {reference.num_chains} chains x {reference.num_draws} draws in {reference.seconds:.0f} s, "
        f"reliability of R {reference.reliability['R']:.4f}, of K {reference.reliability['K']:.4f}"
    )
    ours = []
    if runs is not None:
        ours = [saved_run(runs, network, reference, level=budget.level, seed=seed, clock=clock)]
        say(f"  {ours[0].name}: {outcome(ours[0])}")
        variants = {}
    for name, make in variants.items():
        sampler = make(law)
        found = measure(
            name, network, sampler, reference, level=budget.level, seconds=budget.ours, seed=seed, clock=clock
        )
        ours.append(found)
        say(f"  {name}: {outcome(found)}")
    record = {
        "what": network.what,
        "level": budget.level,
        "budget": dataclasses.asdict(budget),
        "runs": runs is not None,
        "num_samples": len(network.probe[1]),
        "num_train": len(network.train[1]),
        "law": {"n_beta": law.n_beta, "localization": law.localization},
        "reference": {key: value for key, value in vars(reference).items() if key != "entries"},
        "ours": [vars(result) for result in ours],
    }
    if ready is not None:
        record["peer"] = compare_peer(ready, law, reference, ours[0], budget, say)
    return record


def compare_peer(
    peer: Peer, law: Law, reference: Reference, ours: Result, budget: Budget, say: Callable[[str], None]
) -> dict[str, Any]:
    """devinterp at its defaults, wholly by default, and over the grid; its times are bounded by those of `ours`."""
    unit = ours.seconds["R"] or ours.ran
    long, short = min(budget.long * unit, budget.cap), min(budget.short * unit, budget.cap)
    kept = {"level": budget.level, "seconds": long}
    fewest = int(DEFAULTS["num_draws"])
    settings = at_defaults(law.n_beta, law.localization)
    defaults = peer.measure("defaults, our law", settings, reference, **kept, least_draws=fewest)
    say(f"  devinterp defaults, our law: {outcome(defaults)}")
    kept["seconds"] = 0.0  # its 100 draws, no more: there is no law to reach
    wholly = peer.measure("wholly default", wholly_default(), reference, **kept, least_draws=fewest)
    say(f"  devinterp wholly default: {outcome(wholly)}")
    points = measure_grid(
        peer, grid(law, peer.method), reference, level=budget.level, short=short, long=long, say=say
    )  # fmt: skip
    return {
        "versions": peer.versions,
        "costs": {method: vars(cost) for method, cost in peer.costs.items()},
        "method": peer.method,
        "defaults": vars(defaults),
        "wholly": vars(wholly),
        "grid": [vars(point) for point in points],
    }


def plain(value: Any) -> Any:
    """JSON without NaN and infinity, which are null."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", metavar="PATH", help="a python that has devinterp 1.3.2")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument(
        "--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="the first is ours"
    )
    parser.add_argument("--fashion-checkpoint", type=Path, help="trained weights, read if there and else written")
    parser.add_argument("--fashion-runs", type=Path, metavar="FOLDER", help="of bench.studies.fashion_auto: used again")
    parser.add_argument("--add", action="store_true", help="to the networks that --record has already")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: the processor's, on a busy machine")
    parser.add_argument("--seed", type=int, default=0)
    for item in dataclasses.fields(Budget):
        parser.add_argument(f"--{item.name}", type=float, default=item.default, help="see Budget (default %(default)s)")
    parser.add_argument("--out", type=Path, help="Markdown file to write (docs/time_to_truth.md)")
    parser.add_argument("--record", type=Path, help="JSON file to write (bench/results/time_to_truth.json)")
    options = parser.parse_args()

    torch.set_num_threads(1)
    budget = Budget(**{item.name: getattr(options, item.name) for item in dataclasses.fields(Budget)})
    machine = environment(extension.load().simd("auto"), torch.get_num_threads())
    record: dict[str, Any] = {
        "environment": {**machine, "git_sha": provenance.git_sha() or machine["git_sha"]},
        "versions": provenance.versions(),
        "budget": dataclasses.asdict(budget),
        "seed": options.seed,
        "clock": options.clock,
        "networks": {},
    }
    if options.add and options.record.exists():
        record["networks"] = json.loads(options.record.read_text())["networks"]
    with tempfile.TemporaryDirectory() as folder:
        python = options.peer_python
        peer = None if python is None else lambda network: Peer(python, network, Path(folder), options.clock)
        for name in options.networks:
            start = time.perf_counter()
            network = NETWORKS[name](options.fashion_checkpoint)
            variants = {variant: VARIANTS[variant] for variant in options.variants}
            runs = options.fashion_runs if name == "fashion" else None
            found = compare(
                network, budget, variants=variants, peer=peer, seed=options.seed, clock=options.clock, runs=runs
            )
            sha = record["environment"]["git_sha"]
            record["networks"][name] = {**found, "took": time.perf_counter() - start, "git_sha": sha}
            # After every network: an hour's work should not hang on the next one.
            text = page(plain(record))
            if options.out is not None:
                options.out.write_text(text)
            if options.record is not None:
                options.record.parent.mkdir(parents=True, exist_ok=True)
                options.record.write_text(json.dumps(plain(record), indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
