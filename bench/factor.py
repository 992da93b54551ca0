"""The factor form on disk, at the size it is made for: times and peak memory of writing and of every way of reading.

python -m bench.factor [--num-samples 1000000] [--num-draws 1000] [--threads 2] [--folder DIR] [--record FILE]

The traces are synthetic: ten planted groups whose samples share a signal, and noise of their own. The default writes
2 GB to the folder (a temporary one, removed at the end) and takes minutes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lossk
from bench.machine import environment
from bench.markdown import megabytes, seconds, table
from bench.memory_watch import MemoryWatch
from bench.options import Found

GROUPS = 10
SHARED = 0.7  # of a sample's variance: its correlation with the others of its group


@dataclass(frozen=True)
class Size:
    """Of the traces, and of what is asked of them."""

    num_samples: int = 1_000_000
    num_draws: int = 1000  # over all chains
    num_chains: int = 4
    num_rows: int = 1000  # whose neighbors are wanted
    num_eigenpairs: int = 10
    side: int = 1000  # of a block
    part: int = 4096  # samples appended at a time


def parts(size: Size) -> Iterator[np.ndarray]:
    """Losses [C, T, n] float32, nats, the samples in order; sample i is of group i mod 10."""
    draws = size.num_draws // size.num_chains
    root = np.random.SeedSequence(0)
    shared = np.random.default_rng(root.spawn(1)[0]).standard_normal((size.num_chains, draws, GROUPS), np.float32)
    for start in range(0, size.num_samples, size.part):
        rng = np.random.default_rng(root.spawn(1)[0])
        sample = np.arange(start, min(start + size.part, size.num_samples))
        losses = rng.standard_normal((size.num_chains, draws, len(sample)), np.float32)
        losses *= (1 - SHARED) ** 0.5
        losses += SHARED**0.5 * shared[:, :, sample % GROUPS]
        losses *= 10.0 ** rng.uniform(-4, -1, len(sample)).astype(np.float32)
        losses += 1
        yield losses


def measure(size: Size, folder: Path) -> Found:
    path, stages = folder / "factor.lossk", {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        watch, start = MemoryWatch(), time.perf_counter()
        result = work()
        stages[name] = {"seconds": time.perf_counter() - start, "peak": watch.bytes()["peak"]}
        return result

    inside = timed("write", lambda: write(size, path))
    kernel: lossk.LossKernel = timed("open", lambda: lossk.open(path))
    rng = np.random.default_rng(1)
    some, others = (np.sort(rng.choice(size.num_samples, min(size.side, size.num_samples), False)) for _ in range(2))
    near = slice(0, min(size.side, size.num_samples))
    rows = rng.choice(size.num_samples, min(size.num_rows, size.num_samples), False)
    timed("read", lambda: [None for _ in kernel.contents.blocks.stripes()])  # type: ignore[attr-defined]
    timed("near block", lambda: kernel[near, near])
    timed("far block", lambda: kernel.correlation(some, others))
    timed("matvec", lambda: kernel.matvec(np.ones(size.num_samples)))
    values, _ = timed("eigsh", lambda: kernel.eigsh(size.num_eigenpairs))
    neighbors = timed("neighbors", lambda: kernel.neighbors(10, rows=rows))
    same = (neighbors.index % GROUPS == torch.from_numpy(rows % GROUPS).unsqueeze(1)).double().mean()
    return {
        "size": asdict(size),
        "stages": stages,
        "seconds_outside": stages["write"]["seconds"] - inside,
        "bytes": sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        "eigenvalues": values.tolist(),
        "same_group": float(same),
        "noise_floor": float(neighbors.noise_floor.median()),
    }


def write(size: Size, path: Path) -> float:
    """Write the traces; the seconds spent in the writer, which are not those of making the traces up."""
    inside = 0.0
    shape = {"num_chains": size.num_chains, "num_draws": size.num_draws // size.num_chains}
    with lossk.TraceWriter(path, num_samples=size.num_samples, **shape) as writer:
        for losses in parts(size):
            start = time.perf_counter()
            writer.append(losses)
            inside += time.perf_counter() - start
        start = time.perf_counter()
        writer.close()
    return inside + time.perf_counter() - start


def section(found: Found) -> str:
    size = found["size"]
    names = {
        "write": f"write (of it {seconds(found['seconds_outside'])} to make the traces up)",
        "open": "open",
        "read": "read every chunk, with its checksum: the floor of one pass",
        "near block": f"a block of {size['side']:,} x {size['side']:,} neighboring samples",
        "far block": f"a block of {size['side']:,} x {size['side']:,} scattered samples",
        "matvec": "matvec (two passes)",
        "eigsh": f"eigsh({size['num_eigenpairs']}) (two passes)",
        "neighbors": f"10 neighbors of {size['num_rows']:,} rows",
    }
    rows = [[names[key], seconds(each["seconds"]), megabytes(each["peak"])] for key, each in found["stages"].items()]
    title = f"## {size['num_samples']:,} samples x {size['num_draws']:,} draws, {megabytes(found['bytes'])} on disk"
    planted = (
        f"Of the neighbors {found['same_group']:.1%} are of the row's planted group ({1 / GROUPS:.0%} by chance); the "
        f"median noise floor is {found['noise_floor']:.2f}. Peak: resident memory of the whole process."
    )
    return "\n\n".join([title, table(["", "time", "peak memory"], rows), planted])


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Size()
    for name in ("num_samples", "num_draws", "num_chains", "num_rows"):
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=getattr(default, name))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, help="where the traces are written; default: the system's temporary one")
    parser.add_argument("--record", type=Path, help="file for the JSON record")
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    size = Size(options.num_samples, options.num_draws, options.num_chains, options.num_rows)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = measure(size, Path(folder))
    print(section(found))
    if options.record is not None:
        options.record.parent.mkdir(parents=True, exist_ok=True)
        whole = {"environment": environment(options.threads), "found": found}
        options.record.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
