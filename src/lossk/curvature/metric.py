"""The coordinates a chain moves in: a scale for each parameter tensor, from the Fisher diagonal at w*.

With `metric="fisher"` the law is

    p(w) ~ exp( -n_beta L_n(w) - localization/2 sum_t F_t |w_t - w*_t|^2 )

over the parameter tensors t, F_t the mean of the Fisher matrix's diagonal over the elements of t
(`lossk.curvature.fisher`): a Gaussian localization of diagonal precision in place of an isotropic one. It is the
penalty of elastic weight consolidation (Kirkpatrick et al. 2017, arXiv 1612.00796) with one number per tensor, and the
shape of a diagonal Laplace prior around w* (Ritter, Botev and Barber 2018). F_t is measured once, before sampling, on
the same training samples and with the same labels' noise whatever the seed of the run, so that the law is a function of
model and data.

F_t falls as 1 / c^2 where a tensor grows by c and the function stays. So networks that compute the same function with
layers of another scale have the same law of functions, and `localization` is a pure number: beside n_beta, the
observations that the data count for, it is those that the pull counts for in a weight of mean Fisher.

The chain moves in u_t = sqrt(F_t) w_t (`Task.rescale`), where the pull is isotropic, and steps fit all tensors alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lossk.curvature.fisher import FisherSamples, fisher_diagonal
from lossk.data.data import Samples
from lossk.ranks.world import World
from lossk.task.task import Task

NUM_SAMPLES = 256  # training samples of the measurement, one backward pass each
SEED = 0  # of these samples and their labels: the law must not depend on the run's
LEAST = 1e-6  # of the largest F_t mean(w*_t^2) that each tensor is taken to have: dead ones do not wander off


def fisher_scales(task: Task, train: Samples) -> dict[str, float]:
    """D_t = 1 / sqrt(F_t) of each sampled parameter by name, at w* (a task entered and not rescaled).

    F_t mean(w*_t^2) does not depend on the scale of a tensor. It is taken to be at least 1e-6 of the largest among the
    tensors; a tensor of zeros whose gradients are all zero gets 0: it stays at w*.

    Raises:
        ValueError: no sampled weight has a gradient at w*, or one is not finite.
    """
    samples = FisherSamples(task, train, SEED, most=NUM_SAMPLES)
    found = [float(part.mean()) for part in fisher_diagonal(range(len(task.sampled)), samples)]
    for name, fisher in zip(task.names, found, strict=True):
        if not math.isfinite(fisher):
            raise ValueError(f"localization='fisher' needs finite gradients at the trained weights; {name} has others")
    if max(found) == 0.0:
        raise ValueError(
            "localization='fisher' needs gradients at the trained weights, which are all zero; give a number or 'auto'"
        )
    squares = [float(p.detach().double().square().mean()) for p in task.sampled]
    least = LEAST * max(fisher * square for fisher, square in zip(found, squares, strict=True))
    floored = [max(f, least / s) if s > 0 else f for f, s in zip(found, squares, strict=True)]
    return {name: 1.0 / math.sqrt(f) if f > 0 else 0.0 for name, f in zip(task.names, floored, strict=True)}


def set_metric(
    sampler: Any, task: Task, train: Samples, chosen: Mapping[str, Any] | None, world: World
) -> dict[str, float] | None:
    """Have the chains of an entered task move in the coordinates of a sampler's metric; returns its scales, if any.

    Args:
        chosen: by the run that is resumed: its scales stay.
        world: the ranks of the run, which all call this; rank 0's scales are everyone's.
    """
    if getattr(sampler, "metric", None) is None:
        return None

    def found() -> dict[str, float]:
        return fisher_scales(task, train) if chosen is None else dict(chosen["scales"])

    scales = world.decide(found)
    task.rescale([scales[name] for name in task.names])
    return scales


def describe_metric(scales: Mapping[str, float] | None) -> list[str]:
    """The law's pull in a line: on which tensor it is strongest, and on which weakest."""
    if scales is None:
        return []
    moved = {name: scale for name, scale in scales.items() if scale > 0}
    strong, weak = min(moved, key=moved.__getitem__), max(moved, key=moved.__getitem__)
    return [
        f"metric = fisher: a weight's pull is localization times its tensor's mean Fisher, "
        f"{moved[strong] ** -2:.2g} of {strong} to {moved[weak] ** -2:.2g} of {weak}"
    ]
