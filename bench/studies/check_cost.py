"""What it costs to prove, before a run, that its passes are the user's model: seconds, and share of a default run.

    python -m bench.studies.check_cost --out docs/checks.md

Two cases, each in this process: the digits demo as `lossk demo` runs it, whose stages `meta["timings"]` has; and a
causal language model of 100M parameters, whose default run of 4 x 200 draws would take hours on a CPU and is reckoned
from its own passes: `USUAL_STEPS` gradients and one pass over the probe a draw.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

import lossk
from bench.language_model import LanguageModel, Shape, sequences
from bench.machine import described, processor
from bench.markdown import replace_between, seconds, table
from lossk import provenance
from lossk.data.reading import read_samples
from lossk.pilot.passes_pilot import USUAL_STEPS
from lossk.recipes import digits
from lossk.task.agreement import prove, witness_of
from lossk.task.losses import resolve_loss
from lossk.task.task import Task, fitting_batch

MARKS = ("<!-- check_cost begins -->", "<!-- check_cost ends -->")
DRAWS = 4 * 200
LARGE = Shape(vocabulary=32_000, context=64, width=768, heads=12, blocks=12)
SMALL = Shape(vocabulary=64, context=8, width=16, heads=2, blocks=1)


def of_digits(draws: int = 100) -> dict[str, Any]:
    """The demo's run."""
    task = digits.make_task()
    kernel = lossk.build_kernel(
        task.model, task.samples, train=task.train, num_chains=4, num_draws=draws, tile=512, progress=False
    )
    timings = kernel.meta["timings"]
    weights = sum(p.numel() for p in task.model.parameters())
    return {
        "name": f"digits CNN, 4 x {draws} draws",
        "weights": weights,
        "check": timings["check"],
        "run": timings["total"],
    }


def of_language_model(shape: Shape, count: int, minibatch: int) -> dict[str, Any]:
    """A language model's check, and its run as its passes foretell it."""
    torch.manual_seed(0)
    model, ids = LanguageModel(shape), sequences(count, shape)
    samples = read_samples((ids[:, :-1], ids[:, 1:]))
    task = Task(model, resolve_loss("token_cross_entropy", "cpp"))
    start = time.perf_counter()
    placed, positions = prove(task, {"loader": samples})
    witness_of(task, placed)
    check = time.perf_counter() - start
    batch = fitting_batch(task.passes.probe_batch, positions["loader"])
    with task:
        start = time.perf_counter()
        for _, part in placed["loader"].batches(batch):
            task.rows(part)
        probe = time.perf_counter() - start
        start = time.perf_counter()
        task.gradient(placed["loader"], torch.arange(minibatch))
        step = time.perf_counter() - start
    run = DRAWS * (probe + USUAL_STEPS * step)
    name = f"causal LM, {count} x {shape.context} tokens, minibatch {minibatch}, 4 x 200 draws (reckoned)"
    return {"name": name, "weights": task.num_weights, "check": check, "run": run}


def section(found: list[dict[str, Any]]) -> str:
    """The table."""
    rows = [
        (f["name"], f"{f['weights']:,}", seconds(f["check"]), seconds(f["run"]), f"{f['check'] / f['run']:.2%}")
        for f in found
    ]
    return table(("model and run", "weights", "check", "run", "share"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="page to write the table into")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that it runs")
    options = parser.parse_args()
    small = options.tiny
    found = [of_language_model(SMALL, 16, 4)] if small else [of_digits(), of_language_model(LARGE, 64, 16)]
    made = f"{processor()}, {torch.get_num_threads()} threads; {described(provenance.versions())}"
    text = f"{section(found)}\n\n`python -m bench.studies.check_cost`, git {provenance.git_sha()}, {made}."
    print(text)
    if options.out is not None:
        options.out.write_text(replace_between(options.out.read_text(), MARKS, text))


if __name__ == "__main__":
    main()
