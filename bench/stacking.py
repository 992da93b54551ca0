"""Several chains evaluated together (torch.func, weights stacked) against one after the other.

python -m bench.stacking [--quick] [--checkpoint CNN.pt]
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, stack_module_state, vmap

from bench.floor import Passes, backward_pass, forward_pass, search
from bench.jobs import MAKERS, Job
from bench.markdown import spread, table
from bench.options import Found, Options, run_alone
from bench.turns import Turn, column, ratio, take_turns

CHAINS = 4
ONE_BY_ONE, STACKED = "one after the other", "stacked"


def measure(options: Options) -> Found:
    return {name: measure_job(MAKERS[name](options), options) for name in options.networks}


def measure_job(job: Job, options: Options) -> Found:
    """Ratios of the forward pass over all samples, and of the gradient of a minibatch, for four chains."""
    floor = search(job, options.threads)
    rounds = options.pick(full=15, quick=3, tiny=1)
    found: Found = {"what": job.what}
    for kind, single, stacked in (
        ("forward", forward_pass(job, floor.forward), stacked_forward(job, floor.forward)),
        ("gradient", backward_pass(job, floor.backward), stacked_gradient(job, floor.backward)),
    ):
        contenders = {ONE_BY_ONE: timed(single, CHAINS), STACKED: timed(stacked, 1)}
        for contender in contenders.values():
            contender()
        turns = take_turns(contenders, rounds)
        found[kind] = ratio(column(turns[STACKED]), column(turns[ONE_BY_ONE]))
    torch.set_num_threads(options.threads)
    return found


def timed(work: Callable[[], object], times: int) -> Callable[[], Turn]:
    def run() -> Turn:
        start = time.perf_counter()
        for _ in range(times):
            work()
        return {"seconds": time.perf_counter() - start}

    return run


def stacked_forward(job: Job, passes: Passes) -> Callable[[], object]:
    """The losses of all samples for every chain's weights, on batches as large as the best single pass's."""
    model = passes.model(job.model)
    weights, buffers = stack_module_state([passes.model(job.model) for _ in range(CHAINS)])
    x, y = passes.lay_out(job.probe[0]), job.probe[1]

    def losses(w: dict[str, Tensor], b: dict[str, Tensor], part: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, (w, b), (part,)), targets, reduction="none")

    every = vmap(losses, in_dims=(0, 0, None, None))

    @torch.no_grad()
    def run() -> object:
        torch.set_num_threads(passes.threads)
        return [
            every(weights, buffers, x[start : start + passes.batch], y[start : start + passes.batch])
            for start in range(0, len(y), passes.batch)
        ]

    return run


def stacked_gradient(job: Job, passes: Passes) -> Callable[[], object]:
    """The gradients of every chain's minibatch at its weights."""
    model = passes.model(job.model)
    weights, buffers = stack_module_state([passes.model(job.model) for _ in range(CHAINS)])
    weights = {name: w.detach() for name, w in weights.items()}
    size = min(job.batch_size, len(job.train[1]) // CHAINS)
    x = job.train[0][: CHAINS * size].view(CHAINS, size, *job.train[0].shape[1:])
    y = job.train[1][: CHAINS * size].view(CHAINS, size)

    def mean_loss(w: dict[str, Tensor], b: dict[str, Tensor], part: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, (w, b), (part,)), targets)

    every = vmap(grad(mean_loss))

    def run() -> object:
        torch.set_num_threads(passes.threads)
        return every(weights, buffers, x, y)

    return run


def section(found: Found) -> str:
    rows = [[each["what"], spread(each["forward"]), spread(each["gradient"])] for each in found.values()]
    return "\n\n".join(
        [
            "## Several chains at once",
            table(["stacked / one after the other", "losses of all samples", "gradient of a minibatch"], rows),
            f"Time of {CHAINS} chains' passes with their weights stacked (`torch.func.vmap`) over that of {CHAINS} "
            "bare passes, at the floor's settings. Above 1, stacking costs time; lossk runs one after the other.",
        ]
    )


if __name__ == "__main__":
    run_alone(measure, section, __doc__)
