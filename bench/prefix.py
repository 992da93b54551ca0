"""Sampling the last layer of the Fashion-MNIST CNN, with and without the frozen prefix's cache.

python -m bench.prefix [--quick] [--checkpoint CNN.pt]
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import lossk
from bench.jobs import Job, changed, make_cnn
from bench.markdown import spread, table
from bench.options import Found, Options, run_alone
from bench.turns import Turn, column, quantiles, ratio, take_turns

CACHED, WHOLE = "prefix cached", "whole passes"
TARGET = 5.0


def measure(options: Options) -> Found:
    counts = options.pick(
        full={"num_draws": 50, "rounds": 3}, quick={"num_draws": 5, "rounds": 2}, tiny={"num_draws": 2, "rounds": 1}
    )
    job = changed(make_cnn(options), options, counts)
    kernels: dict[str, Any] = {}
    turns = take_turns({name: turn(job, name, kernels) for name in (CACHED, WHOLE)}, job.rounds)
    times = {name: column(found) for name, found in turns.items()}
    cached, whole = (kernels[name].to_numpy() for name in (CACHED, WHOLE))
    return {
        "what": job.what,
        "job": job.spec(),
        "said": kernels[CACHED].meta["passes_reasons"],
        "seconds": {name: quantiles(found) for name, found in times.items()},
        "ratio": ratio(times[WHOLE], times[CACHED]),
        "difference": float(abs(cached - whole).max() / abs(whole).max()),
    }


def turn(job: Job, name: str, kernels: dict[str, Any]) -> Callable[[], Turn]:
    """One build with the last layer sampled; its kernel is left in `kernels`."""
    last = next(reversed([key for key, _ in job.model.named_parameters()])).rsplit(".", 1)[0]
    sampler = job.sampler(params=[f"{last}.*"])
    passes = lossk.Passes(frozen_prefix=name == CACHED)

    def run() -> Turn:
        start = time.perf_counter()
        kernels[name] = lossk.build_kernel(
            job.model,
            job.probe,
            train=job.train,
            sampler=sampler,
            num_chains=job.num_chains,
            num_draws=job.num_draws,
            passes=passes,
            progress=False,
        )
        return {"seconds": time.perf_counter() - start}

    return run


def section(found: Found) -> str:
    job, over = found["job"], found["ratio"]
    rows = [[name, spread(each, "s")] for name, each in found["seconds"].items()]
    said = f"{job['num_rows']:,} rows, {job['num_chains']} x {job['num_draws']} draws. " + " ".join(found["said"])
    return "\n\n".join(
        [
            "## The last layer alone, with and without a frozen prefix",
            f"{found['what']}, its last layer sampled: {said}.",
            table(["", "time of `build_kernel`"], rows),
            f"Whole passes / cached: **{spread(over)}** (target: at least {TARGET:g}). Largest difference of two "
            f"entries of the kernels, over the largest entry: {found['difference']:.2g}.",
        ]
    )


if __name__ == "__main__":
    run_alone(measure, section, __doc__)
