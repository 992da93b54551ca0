"""What a run's chains measure at their last draws, for the verdict: how much the run pays for, and what it tells."""

from __future__ import annotations

from dataclasses import dataclass

from lossk.accumulate.trace_watch import TraceWatch
from lossk.curvature.curvature import DRAWN_SAMPLES, GLANCE_PASSES, PASSES_PER_ITERATION
from lossk.memory import Budget
from lossk.pilot.pilot import Pilot
from lossk.pilot.vectors import WEIGHTS, chain_vectors, judging_vectors, most_vectors
from lossk.plan.layout import PLANNED
from lossk.samplers.baoab import BAOAB
from lossk.samplers.chain import Judging
from lossk.samplers.samplers import Sampler
from lossk.samplers.sgld import SGLD
from lossk.task.task import Task

SHARE = 0.03  # of a run's passes
GLANCING, MOST_GLANCES = 0.01, 16  # likewise; of a chain
FEWEST_SAMPLES = 32  # that a chain measures at its last draw
ITERATIONS = 7  # as a rule, with the one of the samples held out; of 10 at most
CONTROLLED = 2.0  # times as dear with a control variate


def plan_judging(sampler: Sampler, pilot: Pilot | None, run_passes: float, num_chains: int) -> Judging:
    """What the chains measure; nothing while settings are to be chosen, or without a pilot."""
    if pilot is None or not isinstance(sampler, SGLD | BAOAB) or sampler.has_auto:
        return Judging()
    chains, samples = judging_samples(run_passes, num_chains, controlled=bool(sampler.control_variate))
    glances = min(int(GLANCING * run_passes / GLANCE_PASSES / num_chains), MOST_GLANCES)
    return Judging(chains, samples, glances)


def judging_samples(run_passes: float, num_chains: int, *, controlled: bool) -> tuple[int, int]:
    """(chains, samples): how many chains measure at their last draw, and on how many samples, and as many others.

    3 % of the run's passes pay for it. Many draws with few samples say more than the reverse.
    """
    dear = ITERATIONS * PASSES_PER_ITERATION * (CONTROLLED if controlled else 1.0)
    affordable = int(min(SHARE * run_passes / dear, num_chains * DRAWN_SAMPLES))
    chains = min(affordable // FEWEST_SAMPLES, num_chains)
    return chains, affordable // chains if chains else 0


def foreseen_vectors(sampler: Sampler, run_passes: float, num_chains: int, *, piloted: bool) -> float:
    """Vectors of all weights that a run holds at its peak, before its sampler is resolved.

    Args:
        run_passes: the run's passes, in forward passes of one sample.
        piloted: a pilot goes before the run.
    """
    drawn = isinstance(sampler, SGLD | BAOAB)
    judged = drawn and judging_samples(run_passes, num_chains, controlled=False)[1] > 0
    return most_vectors(sampler, judged=judged, piloted=piloted)


def informed_pilot(pilot: Pilot | None, sampler: Sampler, watch: TraceWatch) -> Pilot | None:
    """The pilot of a resolved sampler with what the chains measured."""
    if pilot is None or not isinstance(sampler, SGLD | BAOAB):
        return pilot
    return pilot.informed(
        watch.curvature,
        watch.variance,
        watch.glances,
        localization=float(sampler.localization),
        controlled=bool(sampler.control_variate),
    )


@dataclass(frozen=True)
class Working:
    """Bytes of host memory that the passes and vectors of a run take. All 0 where they are on a device."""

    pilot: int  # the peak of the pilot, what was taken before included
    run: int  # passes and vectors beyond those every run is planned with


def working_bytes(
    task: Task,
    passes: int,
    asked: Sampler,
    sampler: Sampler,
    budget: Budget,
    taken: int,
    *,
    judged: bool,
    piloted: bool,
) -> Working:  # fmt: skip
    """Foreseen from the settings; what the pilot was seen to take beyond that, the run's passes take too.

    Args:
        passes: bytes of a pass at its peak (`pass_bytes`).
        asked, sampler: as asked for, and resolved.
        taken: when the run is planned: the weights, w* and the gradient are in it.
        judged: chains measure at their last draws.
        piloted: a pilot went before.
    """
    if task.device.type != "cpu":
        return Working(budget.reached(), 0)

    def beyond(vectors: float, held: int) -> int:
        return int(4 * max(vectors - held, 0) * task.num_weights)

    foreseen = taken + passes + beyond(most_vectors(asked, judged=False, piloted=piloted), WEIGHTS)
    # Kernels have memory of their own inside, and the C library keeps some of what is freed.
    inside = max(budget.grown() - foreseen, 0)
    vectors = judging_vectors(sampler) if judged else chain_vectors(sampler)
    return Working(max(foreseen, budget.reached()), passes + inside + beyond(vectors, PLANNED))
