"""On paper: time and memory for N = 50 thousand, 1.28 and 10 million on 1, 8 and 64 GPUs. A model, not a measurement.

python -m bench.studies.simulate_scaling [--record RECORD_OF_bench.scaling] [--out FILE]

Every constant is printed with its source. With the record of `bench.scaling`, the same model predicts that run's two
processes from its one process, which is all that can be checked here.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.markdown import table
from lossk.plan.layout import Size, largest_share
from lossk.ranks.mesh import Mesh, choose_mesh
from lossk.timings import duration

CHAINS, DRAWS, BURNIN, SPACING, BATCH = 4, 200, 200, 10, 256
TILE, PANEL = 4096, 16


@dataclass(frozen=True)
class Device:
    """One GPU and its link. Rates as a run would see them, not peaks."""

    passes: float = 0.25 * 495e12  # FLOP/s of forward and backward passes
    products: float = 0.6 * 67e12  # FLOP/s of rank updates in float32
    memory: float = 80e9  # bytes
    bandwidth: float = 0.7 * 3.35e12  # bytes/s of its memory
    link: float = 0.7 * 50e9  # bytes/s received by a rank in an all-gather


SOURCES = """\
**A simulation: nothing here was measured on a GPU.** Constants, from NVIDIA's data sheet of the H100 SXM (80 GB):
495 TFLOP/s TF32 dense, 67 TFLOP/s float32, 3.35 TB/s; from that of its ConnectX-7 adapters, one to a GPU: 400 Gb/s.
Assumed: passes run at 25 % of the first (TF32), rank updates at 60 % of the second (full float32), memory and link at
70 %. The link is taken for 8 GPUs too, where NVLink is faster. Networks: ResNet-18 on 32 x 32 images, 1.1 GFLOP a
forward pass; ResNet-50 on 224 x 224, 8.2 GFLOP; backward is twice that. Run: 4 chains x 200 draws, 200 steps of
burn-in, 10 between draws, minibatches of 256; tiles of 4,096 in float32, panels of 16 draws. Left out: reading and
decoding data (taken as resident), start-up, stragglers, the pilot, the end of the run. Where tiles do not fit, the
factor form (`form="factor"`) is priced instead."""

NETWORKS = {
    50_000: ("ResNet-18", 1.1e9, 11.2e6),
    1_281_167: ("ResNet-50", 8.2e9, 25.6e6),
    10_000_000: ("ResNet-50", 8.2e9, 25.6e6),
}


@dataclass(frozen=True)
class Forecast:
    mesh: Mesh
    steps: float  # seconds of gradient and SGLD steps, of a rank
    probe: float
    gather: float  # hidden behind the two above where it is the shorter
    update: float
    tile_bytes: int  # of the largest share
    panel_bytes: float
    factor_bytes: float

    @property
    def seconds(self) -> float:
        return max(self.steps + self.probe, self.gather) + self.update


def forecast(num_samples: int, ranks: int, device: Device, *, tiles: bool) -> Forecast:
    """The work of the busiest rank, by the dealing that lossk does."""
    _, flops, num_weights = NETWORKS[num_samples]
    step = BATCH * 3 * flops / device.passes + 16 * num_weights / device.bandwidth
    steps_per_draw = (BURNIN + SPACING * DRAWS) / DRAWS
    probe = num_samples * flops / device.passes
    mesh = choose_mesh(ranks, [DRAWS] * CHAINS, steps_per_draw * step, probe)
    rounds, draws = -(-CHAINS // mesh.rows), CHAINS * DRAWS
    size = Size(num_samples, TILE, PANEL, CHAINS, DRAWS, "float32", int(num_weights))
    share = largest_share(size, ranks) if size.tile_rows < 500 else size.entries // ranks  # of millions of tiles
    received = 4 * draws * num_samples * (1 - 1 / ranks)
    return Forecast(
        mesh,
        steps=rounds * DRAWS * steps_per_draw * step,
        probe=rounds * DRAWS * probe / mesh.shards,
        gather=received / device.link,
        update=2 * share * draws / device.products if tiles else 0.0,
        tile_bytes=4 * share if tiles else 0,
        panel_bytes=4 * PANEL * num_samples * (2 * mesh.rows + 1),
        factor_bytes=2 * draws * num_samples,
    )


def section(device: Device) -> str:
    rows = []
    for num_samples, (network, _, _) in NETWORKS.items():
        for ranks in (1, 8, 64):
            found = forecast(num_samples, ranks, device, tiles=True)
            held = found.tile_bytes + found.panel_bytes
            fits = held <= 0.9 * device.memory
            if not fits:
                found = forecast(num_samples, ranks, device, tiles=False)
            form = f"tiles, {held / 1e9:.3g} GB a GPU" if fits else f"factor, {found.factor_bytes / 1e9:.3g} GB on disk"
            if not fits:
                form += f" (tiles: {held / 1e9:,.0f} GB a GPU)"
            rows.append(
                [
                    f"{num_samples:,} ({network})", str(ranks), f"{found.mesh.rows} x {found.mesh.shards}",
                    duration(found.steps), duration(found.probe), duration(found.gather), duration(found.update),
                    f"**{duration(found.seconds)}**", form,
                ]
            )  # fmt: skip
    head = ["samples", "GPUs", "mesh", "steps", "probe", "all-gather", "rank update", "in all", "form, memory"]
    return table(head, rows)


def check(record: dict[str, Any]) -> str:
    """What the model says of two processes, from the stages of one, beside what was measured."""
    rows = []
    names = dict.fromkeys(name.split("|")[0] for name in record["found"])
    for name in names:
        alone, both = (record["found"][f"{name}|{ranks}"] for ranks in (1, 2))
        mesh = Mesh(both[0]["ranks"]["rows"], both[0]["ranks"]["shards"])

        def stage(what: str, records: list[dict[str, Any]] = alone) -> float:
            return statistics.median(found["timings"].get(what, 0.0) for found in records)

        total = statistics.median(found["seconds"] for found in alone)
        shared = stage("gradient") + stage("step")
        dealt = sum(stage(each) for each in ("anchor", "fit", "probe", "update"))  # to every rank alike
        rest = total - shared - dealt
        share = (shared / mesh.rows + dealt / 2 + rest) / total
        # In processor time, which other programs on the machine stretch less than they do wall time.
        predicted = share * statistics.median(found["cpu_seconds"] for found in alone)
        measured = statistics.median(found["cpu_seconds"] for found in both)
        rows.append([name, f"{predicted:.1f} s", f"{measured:.1f} s", f"{measured / predicted - 1:+.0%}"])
    return table(["processor time of the busier of 2 processes", "predicted", "measured", "off by"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, help="of bench.scaling: check the model on it")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    text = f"{SOURCES}\n\n{section(Device())}\n"
    if options.record is not None:
        text += f"\n{check(json.loads(options.record.read_text()))}\n"
    print(text)
    if options.out is not None:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
