"""How many vectors of all weights a run holds at its peak: known from its settings, before any of them is made."""

from __future__ import annotations

from lossk.curvature.curvature import DRAWN_ITERATIONS
from lossk.pilot.effort import FEWER
from lossk.samplers.baoab import BAOAB
from lossk.samplers.hmc import HMC
from lossk.samplers.samplers import Sampler
from lossk.samplers.sgld import SGLD

WEIGHTS = 3  # w, w* and the gradient
COORDINATES = 3  # with a metric: the model's weights, w* beside u*, and a gradient before it is rescaled
LANCZOS = 8  # start, two of its vectors, the center, two gradients, one being made and its parts
HELD_OUT = 2  # vectors that are kept in bfloat16 to the end of an iteration, in the room of one
CONTROL = 3  # the gradient at w*, a minibatch's there, the weights meanwhile
CORRECTION = 2  # a step's noise, and the weights meanwhile
FULL = 8  # the control variate's sum in float64, a block's, a gradient's and its share


def chain_vectors(sampler: Sampler) -> int:
    """What a chain holds: its weights, noise and memory, and a copy of weights and memory where a panel ends."""
    if isinstance(sampler, SGLD):
        own = 1 + (2 if sampler.preconditioner is not None else 0) + (6 if sampler.measure_acceptance else 0)
    elif isinstance(sampler, BAOAB):
        own = 6
    else:
        own = 5 if isinstance(sampler, HMC) else 3
    own += COORDINATES if getattr(sampler, "metric", None) is not None else 0
    return WEIGHTS + own + (CONTROL if _may_control(sampler) else 0) + (CORRECTION if _may_correct(sampler) else 0)


def judging_vectors(sampler: Sampler) -> float:
    """What a chain holds while it is judged at its last draw."""
    return chain_vectors(sampler) + LANCZOS + DRAWN_ITERATIONS / HELD_OUT


def most_vectors(sampler: Sampler, *, judged: bool, piloted: bool) -> float:
    """The most of the pilot, its trial chains, the gradient of a control variate, the chains and their judging."""
    found: list[float] = [chain_vectors(sampler)]
    if piloted and chooses(sampler):
        found.append(chain_vectors(sampler) + LANCZOS)  # measured at draws of a trial chain
    elif piloted and isinstance(sampler, SGLD):
        found.append(WEIGHTS + LANCZOS + FEWER[1] / HELD_OUT)
    if _may_control(sampler):
        found.append(WEIGHTS + FULL)
    if judged:
        found.append(judging_vectors(sampler))
    return max(found)


def chooses(sampler: Sampler) -> bool:
    """Whether a pilot has settings to choose, for which it runs trial chains."""
    names = ("lr", "step_size", "friction", "localization", "num_burnin_steps", "num_steps_bw_draws")
    return any(getattr(sampler, name, None) == "auto" for name in names)


def _may_control(sampler: Sampler) -> bool:
    """Whether there is a control variate, or the pilot may choose one."""
    if isinstance(sampler, SGLD):
        return sampler.control_variate is True or (sampler.control_variate == "auto" and sampler.lr == "auto")
    return isinstance(sampler, BAOAB) and sampler.control_variate


def _may_correct(sampler: Sampler) -> bool:
    """Whether a step's noise is corrected, or the pilot may choose so."""
    if not isinstance(sampler, SGLD) or sampler.preconditioner is not None:
        return False
    return sampler.correction > 0 or (sampler.noise_correction == "auto" and sampler.lr == "auto")
