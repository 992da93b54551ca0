"""How much preparation a run pays for: a share of its own passes, and what is left out where that is little.

Costs are in forward passes of one training sample; a gradient is worth three. There is a floor, some seconds of a core.
It is counted in floating-point operations and not in measured seconds, so that what is chosen depends neither on the
machine nor on what else it does. Where the share does not pay for everything, what goes is, in this order: samples of a
measurement, its iterations, draws at which the curvature is glanced at, steps of trial chains, and the trial itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from lossk.curvature.curvature import (
    DRAWN_ITERATIONS,
    DRAWN_SAMPLES,
    GLANCE,
    ITERATIONS,
    MOST_SAMPLES,
    PASSES_PER_ITERATION,
    Sample,
)
from lossk.data.data import Samples
from lossk.task.task import Task

SHARE = 0.25  # of the run's own passes, where anything is "auto"
SHARE_OF_NUMBERS = 0.03  # where every setting is a number, and only the verdict reads what is measured
FLOOR = 3e11  # floating-point operations: 3 to 10 s of a core
AT_W_STAR = 0.25  # of preparation: the measurements at w*
AT_DRAWS = 0.4  # of what is left then: those at the draws of a trial
CURVATURE = 6  # forward passes of an iteration on one sample: two gradients
VARIANCE = PASSES_PER_ITERATION - CURVATURE  # one gradient, and two of losses
SIZES = ((512, 10), (256, 10), (128, 10), (64, 8), (64, 6), (32, 6), (32, 4), (16, 4), (16, 3), (8, 2))
FEWER = (64, 6)  # samples and iterations, where every setting is a number
ROUGH = "pilot = rough"  # how the line of the reasons begins
COUNTED = 4  # samples of the pass whose operations are counted


@dataclass(frozen=True)
class TrialSize:
    """What a trial chain measures, and how long it may be."""

    samples: int = DRAWN_SAMPLES
    iterations: int = DRAWN_ITERATIONS
    measured: int = 3  # draws at which the curvature is measured, the first right after burn-in
    glances: int = 33  # draws at which it is glanced at, for how much it varies: these draws among them
    glance_samples: int = GLANCE["most"]
    glance_iterations: int = GLANCE["iterations"]
    watched: int = 256  # training samples whose losses are recorded
    records: int = 200

    @property
    def sample(self) -> Sample:
        return {"most": self.samples, "iterations": self.iterations}

    @property
    def glance(self) -> Sample:
        return {**GLANCE, "most": self.glance_samples, "iterations": self.glance_iterations}

    @property
    def passes(self) -> float:
        """Of its measurements, its steps aside."""
        per_iteration = CURVATURE * self.measured + 2 * VARIANCE
        glances = CURVATURE * self.glances * self.glance_samples * self.glance_iterations
        return per_iteration * self.samples * self.iterations + glances + self.watched * self.records


FULL = TrialSize()
TRIALS = (
    FULL,
    TrialSize(128, 10, watched=128),
    TrialSize(64, 8, glances=17, glance_samples=32, watched=64, records=100),
    TrialSize(32, 6, glances=17, glance_samples=16, glance_iterations=3, watched=64, records=50),
    TrialSize(16, 4, measured=2, glances=9, glance_samples=8, glance_iterations=3, watched=32, records=50),
    TrialSize(8, 3, measured=2, glances=5, glance_samples=8, glance_iterations=2, watched=16, records=20),
)


class Effort:
    """What is left of the forward passes that preparation may take, and whether that has changed anything.

    Args:
        passes: in all; infinite where nobody counts.
        automatic: something is to be chosen by what is measured.
    """

    def __init__(self, passes: float = math.inf, *, automatic: bool = True) -> None:
        self.passes = self.left = passes
        self.automatic, self.rough = automatic, False

    def spend(self, passes: float) -> None:
        self.left -= passes

    def at_w_star(self, num_train: int) -> Sample:
        """On what curvature and gradient variance are measured at w*; spent."""
        most, iterations = (MOST_SAMPLES, ITERATIONS) if self.automatic else FEWER
        sizes = [(each, times) for each, times in SIZES if each <= most and times <= iterations]
        held = 1 if self.automatic else 2  # as many samples again are held out

        def cost(size: tuple[int, int]) -> float:
            return held * min(size[0], num_train) * size[1] * PASSES_PER_ITERATION

        allowed = self.passes * (AT_W_STAR if self.automatic else 1.0)
        chosen = next((size for size in sizes if cost(size) <= allowed), sizes[-1])
        self.rough |= min(chosen[0], num_train) < min(most, num_train) and self.automatic
        self.spend(cost(chosen))
        return {"most": chosen[0], "iterations": chosen[1], "held_out": not self.automatic}

    def trial(self) -> TrialSize | None:
        """What the next trial chain measures; spent. None: not even the least can be paid."""
        for size in TRIALS:
            if size.passes <= AT_DRAWS * self.left:
                self.rough |= size != FULL
                self.spend(size.passes)
                return size
        self.rough = True
        return None

    def steps(self, step_passes: float, most: int) -> int:
        """How many steps of a chain are left, at most `most`."""
        return most if math.isinf(self.left) else int(min(most, max(self.left, 0.0) / step_passes))

    def describe(self) -> str:
        """For the reasons of a run."""
        return (
            f"{ROUGH}: {self.passes:,.0f} passes of a sample are all that a run as short as this pays for; more "
            "draws, numbers for settings, or a larger pilot_budget"
        )


def effort_of(
    task: Task, train: Samples, run_passes: float, *, automatic: bool, share: float | None = None
) -> Effort:  # fmt: skip
    """A share of the run's own passes, or the floor.

    Args:
        run_passes: what the run's own passes come to.
        share: `pilot_budget`, or None for the usual.
    """
    if math.isinf(run_passes):
        return Effort(automatic=automatic)
    usual = SHARE if automatic else SHARE_OF_NUMBERS
    floor = FLOOR / operations(task, train)
    return Effort(max((usual if share is None else share) * run_passes, floor), automatic=automatic)


def operations(task: Task, train: Samples) -> float:
    """Floating-point operations of the forward pass of one training sample, at least two for each sampled weight."""
    few = torch.arange(min(COUNTED, len(train)), device="cpu")
    counter, fused = FlopCounterMode(display=False), torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # a whole encoder layer in one operation, which is not counted
    try:
        with counter:
            task.losses(train[few])
    except Exception:  # a model that cannot be run under a dispatch mode is counted by its weights
        return 2.0 * task.num_weights
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return max(counter.get_total_flops() / len(few), 2.0 * task.num_weights)
