"""`sample_losses` on many ranks: panels reach every rank, so every rank has all traces."""

from __future__ import annotations

import torch

from lossk.kernel.traces import LossTraces
from lossk.memory import Budget
from lossk.ranks.distributed import Ranks
from lossk.ranks.mesh import Mesh
from lossk.run import record
from lossk.run.distributed_run import Work, chosen_by_first, meta, rounds, start_clock, usual_panel
from lossk.run.restart import until_it_lasts
from lossk.run.run import Run
from lossk.task.passes import Passes
from lossk.timings import Progress

SETTINGS = {"tile": 4096, "dtype": "float32", "centering": "chain", "form": "traces"}  # no tile is ever made


def sample_on_ranks(ranks: Ranks, run: Run, *, passes: Passes | None, budget: Budget, bar: Progress) -> LossTraces:
    """`sample_losses`, called by every rank with its own copy of model and data.

    Raises:
        DivergedError: a chain left the neighborhood of the trained weights, on some rank.
        DistributedError: the ranks disagree, or one of them has stopped.
        MemoryError: the traces do not fit, on some rank.
    """
    start_clock(ranks, run)
    request = {**record.request(run), **SETTINGS, "panel": usual_panel(ranks, run, budget)}
    ranks.agree({**request, "passes": None if passes is None else passes.to_dict()})
    with chosen_by_first(ranks, run, request, passes, None, None, budget, bar) as (chosen, layout):
        ranks.use_device(run.task.device)
        work = Work(ranks, run, request, layout, Mesh(**chosen["mesh"]), budget, bar, None)

        def attempt() -> torch.Tensor:
            return record.losses(run, (part for received, _ in rounds(work) for part in received))

        losses = until_it_lasts(run, bar, attempt)
        return record.traces(run, losses, {**meta(work), "config": record.request(run)})
