"""The floor: bare forward and forward + backward passes, the best that plain torch does, found by a short search.

Searched: memory format, samples per pass, threads. Under inference_mode, on data laid out beforehand, minibatches
sliced without a gather, gradients left where autograd puts them. No SGLD step, no kernel, no draw of a minibatch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.jobs import Job, losses, mean_loss
from bench.turns import CLOCKS, Turn

BATCHES = (32, 64, 100, 128, 200, 256, 512, 1000, 2000)
SEARCHED = 2000  # samples in a pass of the search
FINALISTS, ROUNDS = 5, 7


@dataclass(frozen=True)
class Passes:
    """How passes are made."""

    channels_last: bool
    batch: int  # samples per pass
    threads: int

    def model(self, model: nn.Module) -> nn.Module:
        """A copy to run on, in eval mode."""
        copy = deepcopy(model).eval()
        return copy.to(memory_format=torch.channels_last) if self.channels_last else copy

    def lay_out(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last and x.ndim == 4 else x


Make = Callable[[Job, Passes], Callable[[], None]]


def forward_pass(job: Job, passes: Passes) -> Callable[[], None]:
    """One draw's losses: all N samples."""
    model, x, y = passes.model(job.model), passes.lay_out(job.probe[0]), job.probe[1]
    out, rows = torch.empty(job.num_rows), job.num_rows // len(y)

    @torch.inference_mode()
    def run() -> None:
        torch.set_num_threads(passes.threads)
        for start in range(0, len(y), passes.batch):
            end = min(start + passes.batch, len(y))
            out[start * rows : end * rows] = losses(model, x[start:end], y[start:end])

    return run


def backward_pass(job: Job, passes: Passes) -> Callable[[], None]:
    """One step's gradient, of the next `batch_size` training samples as they lie."""
    model, x, y = passes.model(job.model), passes.lay_out(job.train[0]), job.train[1]
    size = min(job.batch_size, len(y))
    starts = itertools.cycle(range(0, len(y) - size + 1, size))

    def run() -> None:
        torch.set_num_threads(passes.threads)
        model.zero_grad(set_to_none=True)
        first = next(starts)
        for start in range(first, first + size, passes.batch):
            end = min(start + passes.batch, first + size)
            (mean_loss(model, x[start:end], y[start:end]) * ((end - start) / size)).backward()

    return run


@dataclass(frozen=True)
class Floor:
    """The best passes found, and what the search saw: milliseconds of each candidate."""

    forward: Passes
    backward: Passes
    seen: dict[str, list[dict[str, Any]]]


def search(job: Job, threads: int) -> Floor:
    """Find the fastest passes for a job, with at most `threads` threads."""
    few = replace(job, probe=(job.probe[0][:SEARCHED], job.probe[1][:SEARCHED]))
    formats = (False, True) if any(isinstance(module, nn.Conv2d) for module in job.model.modules()) else (False,)
    counts = sorted({1, threads})
    most = min(SEARCHED, len(job.probe[1]))
    batches = sorted({min(batch, most) for batch in BATCHES})
    forward = [Passes(*each) for each in itertools.product(formats, batches, counts)]
    parts = sorted({max(1, job.batch_size // split) for split in (1, 2, 4)})
    backward = [Passes(*each) for each in itertools.product(formats, parts, counts)]
    found, seen = {}, {}
    for name, make, candidates in (("forward", forward_pass, forward), ("backward", backward_pass, backward)):
        found[name], seen[name] = fastest(make, few, candidates)
    torch.set_num_threads(threads)
    return Floor(found["forward"], found["backward"], seen)


def fastest(make: Make, job: Job, candidates: Sequence[Passes]) -> tuple[Passes, list[dict[str, Any]]]:
    """The candidate of the lowest median: all are tried briefly, the best few then take turns."""
    runs = {passes: make(job, passes) for passes in candidates}
    clock = CLOCKS[job.clock]
    # The first of three warms up.
    first = {passes: min(_time(run, clock) for _ in range(3)) for passes, run in runs.items()}
    finalists = sorted(first, key=lambda passes: first[passes])[:FINALISTS]
    times: dict[Passes, list[float]] = {passes: [] for passes in finalists}
    for _ in range(ROUNDS):
        for passes in finalists:
            times[passes].append(_time(runs[passes], clock))
    best = min(finalists, key=lambda passes: np.median(times[passes]))
    return best, [{**asdict(passes), "ms": round(1e3 * first[passes], 4)} for passes in candidates]


def _time(run: Callable[[], None], clock: Callable[[], float]) -> float:
    start = clock()
    run()
    return clock() - start


def contender(job: Job, floor: Floor) -> Callable[[], Turn]:
    """All of a job's passes, in the order in which the job needs them."""
    forward, backward = forward_pass(job, floor.forward), backward_pass(job, floor.backward)
    forward()
    backward()
    clock = CLOCKS[job.clock]

    def turn() -> Turn:
        spent = {"forward": 0.0, "backward": 0.0}
        for _ in range(job.draws):
            for _ in range(job.num_steps_bw_draws):
                spent["backward"] += _time(backward, clock)
            spent["forward"] += _time(forward, clock)
        return {"seconds": sum(spent.values()), **spent}

    return turn
