"""What a run's chains measure at their last draws, for the verdict: how much the run pays for, and what it tells."""

from __future__ import annotations

from functools import partial

from lossk.baoab import BAOAB
from lossk.curvature import DRAWN_ITERATIONS, DRAWN_SAMPLES, Sample, gradient_variance, largest_curvature
from lossk.data import Samples
from lossk.diagnostics import TraceWatch
from lossk.pass_memory import pass_bytes, peak_of
from lossk.pilot import FEWEST_SAMPLES, PASSES_PER_ITERATION, Pilot
from lossk.samplers import Sampler
from lossk.sgld import SGLD
from lossk.task import Task

SHARE = 0.03  # of a run's passes
ITERATIONS = 7  # as a rule, with the one of the samples held out; of 10 at most
FEW_ITERATIONS = 2  # that show what memory all of them take
CONTROLLED = 2.0  # times as dear with a control variate


def plan_judging(sampler: Sampler, pilot: Pilot | None, run_passes: float, num_chains: int) -> tuple[int, int]:
    """(chains, samples) as `judging_samples` has them; none while settings are to be chosen, or without a pilot."""
    if pilot is None or not isinstance(sampler, SGLD | BAOAB) or sampler.has_auto:
        return 0, 0
    return judging_samples(run_passes, num_chains, controlled=bool(sampler.control_variate))


def judging_samples(run_passes: float, num_chains: int, *, controlled: bool) -> tuple[int, int]:
    """(chains, samples): how many chains measure at their last draw, and on how many samples, and as many others.

    3 % of the run's passes pay for it. Many draws with few samples say more than the reverse.
    """
    dear = ITERATIONS * PASSES_PER_ITERATION * (CONTROLLED if controlled else 1.0)
    affordable = int(min(SHARE * run_passes / dear, num_chains * DRAWN_SAMPLES))
    chains = min(affordable // FEWEST_SAMPLES, num_chains)
    return chains, affordable // chains if chains else 0


def informed_pilot(pilot: Pilot | None, sampler: Sampler, watch: TraceWatch) -> Pilot | None:
    """The pilot of a resolved sampler with what the chains measured."""
    if pilot is None or not isinstance(sampler, SGLD | BAOAB):
        return pilot
    return pilot.informed(
        watch.curvature,
        watch.variance,
        localization=float(sampler.localization),
        controlled=bool(sampler.control_variate),
    )


def working_bytes(task: Task, probe: Samples, train: Samples, minibatch: int, samples: int, seed: int) -> int:
    """What of host memory the passes of an entered task take at their peak, and the judging of a chain.

    Args:
        minibatch: samples of a gradient.
        samples: on which a chain measures at its last draw; 0 for none.
    """
    passes = pass_bytes(task, probe, train, minibatch)
    if samples == 0 or task.device.type != "cpu":
        return passes
    sample: Sample = {"most": samples, "which": 1, "held_out": True, "iterations": FEW_ITERATIONS}
    try:
        judging = max(
            peak_of(partial(what, task, train, seed=seed, **sample)) for what in (largest_curvature, gradient_variance)
        )
    except ValueError:  # a derivative that is not finite: nothing is measured in the run either
        return passes
    return max(passes, judging + 2 * (DRAWN_ITERATIONS - FEW_ITERATIONS) * task.num_weights)  # bfloat16 vectors kept
