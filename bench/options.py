"""What every benchmark of `python -m bench` is told, and the command line of one of them by itself."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.machine import environment
from bench.turns import CLOCKS

SIZES = ("full", "quick", "tiny")  # a measurement to quote; a look; a test that it runs
NETWORKS = ("mlp", "cnn")
JOB_COUNTS = ("num_chains", "num_draws", "num_steps_bw_draws", "batch_size", "rounds")
COUNTS = ("num_samples", *JOB_COUNTS, "peer_samples")  # what --set may change

Found = dict[str, Any]  # what a benchmark measured: plain and JSON-ready


@dataclass(frozen=True)
class Options:
    """Of one run of the benchmarks."""

    size: str = "full"
    threads: int = field(default_factory=torch.get_num_threads)
    peer1_python: str | None = None  # a Python that has devinterp 1.3.2
    peer2_python: str | None = None  # a Python that has devinterp 2.0.1
    checkpoint: Path | None = None  # of the Fashion-MNIST CNN; None trains it, which takes about a minute
    networks: Sequence[str] = NETWORKS
    clock: str = "wall"  # of the whole kernels: "wall" or "cpu"
    changes: dict[str, int] = field(default_factory=dict)  # of COUNTS

    def pick(self, **of_size: Any) -> Any:
        """The value for this run's size: pick(full=..., quick=..., tiny=...)."""
        assert set(of_size) == set(SIZES)
        return of_size[self.size]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that `read` reads."""
    parser.add_argument("--quick", action="store_true", help="fewer samples, draws and rounds: a look, not a result")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="that everyone may use")
    parser.add_argument("--peer1-python", help="a Python that has devinterp 1.3.2; without it, it is left out")
    parser.add_argument("--peer2-python", help="a Python that has devinterp 2.0.1 and datasets")
    parser.add_argument("--checkpoint", type=Path, help="weights of the Fashion-MNIST CNN, written if not there")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: the processor's, on a busy machine")
    parser.add_argument(
        "--set", nargs="+", type=_change, default=[], metavar="NAME=COUNT", help=f"change {', '.join(COUNTS)}"
    )


def read(options: argparse.Namespace) -> Options:
    """Options from a command line with `add_arguments`; sets the number of threads."""
    torch.set_num_threads(options.threads)
    return Options(
        size="quick" if options.quick else "full",
        threads=options.threads,
        peer1_python=options.peer1_python,
        peer2_python=options.peer2_python,
        checkpoint=options.checkpoint,
        networks=options.networks,
        clock=options.clock,
        changes=dict(options.set),
    )


def _change(text: str) -> tuple[str, int]:
    name, _, count = text.partition("=")
    if name not in COUNTS or not count.isdigit() or int(count) == 0:
        raise argparse.ArgumentTypeError(f"must be NAME=COUNT with NAME one of {', '.join(COUNTS)}, got {text!r}")
    return name, int(count)


def run_alone(measure: Callable[[Options], Found], section: Callable[[Found], str], usage: str | None) -> None:
    """One benchmark's own command line: measure, print its section of the page, keep the record if asked to."""
    parser = argparse.ArgumentParser(description=usage, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--record", type=Path, help="file for the JSON record")
    arguments = parser.parse_args()
    options = read(arguments)
    found = measure(options)
    print(section(found))
    if arguments.record is not None:
        arguments.record.parent.mkdir(parents=True, exist_ok=True)
        whole = {"environment": environment(options.threads), "found": found}
        arguments.record.write_text(json.dumps(whole, indent=1) + "\n")
