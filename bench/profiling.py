"""Where the time of a run goes: stages of each network's run, and torch's busiest operators.

    python -m bench.profiling [--quick] [--networks mlp cnn] [--checkpoint CNN.pt]

Not called profile.py: a script in this folder has the folder first on its path, and Python's own profiler would find
that file instead of its `profile`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch.profiler import ProfilerActivity, profile

from bench.end_to_end import ours
from bench.jobs import MAKERS, Job
from bench.markdown import seconds, table
from bench.options import Found, Options, run_alone

TOP = 12
PROFILED_DRAWS = 40  # of one chain: torch.profiler keeps every event
LAST = ("outside any stage", "total")


def measure(options: Options) -> Found:
    found = {}
    for name in options.networks:
        job = replace(MAKERS[name](options), clock="wall")  # as the stages are
        ours(replace(job, num_chains=1, num_draws=2))()  # what is loaded on first use
        found[name] = {"what": job.what, "job": job.spec(), "stages": stages(job), "operators": operators(job)}
    return found


def stages(job: Job) -> dict[str, float]:
    """Seconds per stage, by the run's own account, most first."""
    turn = ours(job)()
    named = {name.removeprefix("stage "): value for name, value in turn.items() if name.startswith("stage ")}
    most_first = dict(sorted(named.items(), key=lambda item: -item[1]))
    return {**most_first, LAST[0]: turn["seconds"] - sum(named.values()), LAST[1]: turn["seconds"]}


def operators(job: Job) -> list[dict[str, Any]]:
    """The operators that take most time themselves, in a short run: [{"name", "calls", "seconds", "share"}]."""
    few = replace(job, num_chains=1, num_draws=min(job.num_draws, PROFILED_DRAWS))
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        ours(few)()
    events = profiler.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    busiest = sorted(events, key=lambda event: -event.self_cpu_time_total)[:TOP]
    return [
        {
            "name": event.key,
            "calls": event.count,
            "seconds": 1e-6 * event.self_cpu_time_total,
            "share": event.self_cpu_time_total / total,
        }
        for event in busiest
    ]


def section(found: Found) -> str:
    parts = ["## Where the time goes"]
    for each in found.values():
        total = each["stages"]["total"]
        rows = [[name, seconds(value), f"{value / total:.1%}"] for name, value in each["stages"].items()]
        busiest = [
            [f"`{one['name']}`", f"{one['calls']:,}", seconds(one["seconds"]), f"{one['share']:.1%}"]
            for one in each["operators"]
        ]
        job = each["job"]
        parts += [
            f"### {each['what']}: {job['num_rows']:,} rows, {job['num_chains']} x {job['num_draws']} draws",
            table(["stage", "time", "share"], rows),
            table(["operator", "calls", "time of its own", "share"], busiest),
        ]
    return "\n\n".join([*parts, HOW])


HOW = f"""Stages by the run's own account (`kernel.meta["timings"]`): *anchor* is the losses of the training data at w*,
*fit* its gradient where a control variate needs that, *pilot* what is measured before sampling, *gradient* the
minibatch and its forward and backward pass, *step* the SGLD step, *probe* the losses of all rows, *update* centering
and the rank-k update. Operators by torch.profiler, which slows small ones down, in a run of at most {PROFILED_DRAWS}
draws of one chain, anchor and pilot included; the shares are of the time inside torch's operators."""


if __name__ == "__main__":
    run_alone(measure, section, __doc__)
