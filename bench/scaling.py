"""One and two processes on this machine: the Fashion-MNIST CNN, two chains side by side, and one chain shared.

python -m bench.scaling --checkpoint CNN.pt [--num-samples 10000] [--num-draws 20] [--repeat 2] [--record FILE]

One thread and one core to a process; contenders take turns, medians of the repeats. Needs two free cores. With
--num-train 500 --num-samples 300 --num-draws 2 --repeat 1 it is a check that it runs, and no measurement.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.machine import environment
from bench.markdown import table
from lossk.recipes import fashion

STAGES = ("anchor", "fit", "gradient", "probe", "wait", "update", "store")
CASES = {"2 chains, side by side": 2, "1 chain, its probe shared": 1}


def run(options: argparse.Namespace, ranks: int, num_chains: int, store: Path) -> dict[str, Any]:
    """One run by so many ranks: rank 0's record."""
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "-m", "bench.scaling_rank",
        str(store), str(options.checkpoint), str(options.num_samples), str(num_chains),
        str(options.num_draws * 2 // num_chains), str(options.num_train),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("record ")]
    if done.returncode or not lines:
        raise RuntimeError(done.stderr)
    cpu = [float(line.removeprefix("cpu ")) for line in done.stdout.splitlines() if line.startswith("cpu ")]
    return {**json.loads(lines[0].removeprefix("record ")), "cpu_seconds": max(cpu)}


def measure(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """The records of every case and number of ranks."""
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(options.repeat):
            for name, num_chains in CASES.items():
                for ranks in (1, 2):
                    store = Path(folder) / f"{turn}-{num_chains}-{ranks}.lossk"
                    found.setdefault(f"{name}|{ranks}", []).append(run(options, ranks, num_chains, store))
    return found


def section(found: dict[str, list[dict[str, Any]]]) -> str:
    rows = []
    for name in CASES:
        alone, both = (found[f"{name}|{ranks}"] for ranks in (1, 2))
        digests = {record["losses"] for record in (*alone, *both)}
        times = [statistics.median(record["seconds"] for record in records) for records in (alone, both)]
        cpu = [statistics.median(record["cpu_seconds"] for record in records) for records in (alone, both)]
        mesh = both[0]["ranks"]
        stages = [statistics.median(record["timings"].get(stage, 0.0) for record in both) for stage in STAGES]
        words = [
            name,
            f"{mesh['rows']} x {mesh['shards']}",
            *(f"{value:.1f} s" for value in times),
            f"{times[0] / times[1]:.2f}",
            *(f"{value:.1f} s" for value in cpu),
            f"{cpu[0] / cpu[1]:.2f}",
            " / ".join(f"{value:.1f}" for value in stages),
        ]
        rows.append([*words, "the same" if len(digests) == 1 else "DIFFERENT"])
    busy = ["processor time", "of the busier of 2", "ratio"]
    head = [
        "",
        "mesh of 2",
        "1 process",
        "2 processes",
        "speedup",
        *busy,
        " / ".join(STAGES) + ", s, of 2",
    ]
    return table([*head, "traces, bit for bit"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="the network, read or written")
    parser.add_argument("--num-samples", type=int, default=10_000)
    parser.add_argument("--num-train", type=int, default=60_000, help="training images, of the first so many")
    parser.add_argument("--num-draws", type=int, default=20, help="of each of two chains; a lone chain has as many")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    if not options.checkpoint.exists():
        torch.set_num_threads(1)
        fashion.make_task(num_probe=1000, checkpoint=options.checkpoint)
    machine = environment(1)
    found = measure(options)
    if options.record is not None:
        options.record.write_text(json.dumps({"machine": machine, "found": found}, indent=1) + "\n")
    print(section(found))
    if any(record["cores"] < 2 for records in found.values() for record in records):
        print("\nNOT A MEASUREMENT: the two processes had one core between them.")
    print(
        f"\n{machine['device']}, 1 thread and 1 core to a process, load before {machine['load_average']}, "
        f"git {machine['git_sha'][:9]}; {options.num_samples:,} images, medians of {options.repeat}"
    )


if __name__ == "__main__":
    main()
