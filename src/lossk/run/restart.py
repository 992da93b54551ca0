"""An automatic run that explodes begins again, with half the step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from lossk.errors import DivergedError
from lossk.run.run import Run
from lossk.samplers.baoab import BAOAB
from lossk.samplers.samplers import Sampler
from lossk.samplers.sgld import SGLD
from lossk.timings import Progress

Result = TypeVar("Result")

MOST_RESTARTS = 6  # the step is then a 64th of the pilot's


def until_it_lasts(
    run: Run, bar: Progress, attempt: Callable[[Run], Result], forget: Callable[[Run], None] = lambda run: None
) -> Result:
    """What `attempt` makes of the run; after each explosion of an automatic one it is made again, with half the step.

    Args:
        forget: what has been kept of an attempt that exploded, before the next.

    Raises:
        DivergedError: the step was not to be chosen, or is as short as it may become. Of ranks, on every one.
    """
    while True:
        try:
            return attempt(run)
        except DivergedError as error:
            again = _with_half_the_step(run, error)
            if again is None:
                raise
        run = again
        bar.say(run.reasons[-1])
        forget(run)


def _with_half_the_step(run: Run, error: DivergedError) -> Run | None:
    """An automatic run that exploded, to be made again, which it says; None where nothing is to be chosen."""
    before = sum(reason.startswith("restart") for reason in run.reasons)
    shorter = with_shorter_step(run.asked, run.sampler) if before < MOST_RESTARTS else None
    if shorter is None:
        return None
    said = f"restart {before + 1} = half the step, twice the steps: {str(error).split(';')[0]}"
    return run.begin_again(shorter, said)


def with_shorter_step(asked: Sampler, resolved: Sampler) -> Sampler | None:
    """Half the step, and twice the steps that were chosen; None where the step was not to be chosen."""
    if not isinstance(resolved, SGLD | BAOAB) or not isinstance(asked, SGLD | BAOAB):
        return None
    step = "lr" if isinstance(resolved, SGLD) else "step_size"
    if getattr(asked, step) != "auto":
        return None
    changed: dict[str, Any] = {step: getattr(resolved, step) / 2}
    for steps in ("num_burnin_steps", "num_steps_bw_draws"):
        if getattr(asked, steps) == "auto":
            changed[steps] = 2 * getattr(resolved, steps)
    return dataclasses.replace(resolved, **changed)
