"""What is wrong with a run, if anything: a table of rules over its numbers, and the limits that they keep."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

from lossk.diagnostics.bias import BIAS_BUDGET, STEEPEST_BUDGET, UNEVEN
from lossk.diagnostics.reliability import times_as_many

REJECTED = 0.1  # least acceptance of a chain's own steps; 0.6 to 0.9 is what to aim at
LLC_Z = 3.0  # standard errors below 0 from which w* is no minimum
STABILITY_LIMIT = 1.0  # of eps a / 4 at the steepest draw of a thousand, where the step is not stable from there on
BIAS_LIMIT = 0.1  # of the foreseen excess of a variance, discretisation and noise together: twice what "auto" allows
GROWN, GROWN_Z = 0.15, 4.0  # of |w - w*|^2 over the run: flat directions are still spreading. At z 3, runs of 4 weights
# that stood still were told so too: squares of few directions are skewed
BURNIN_LIMIT = 0.9
DRIFT_LIMIT, DRIFT_Z_LIMIT = 0.7, 4.0
FORGOTTEN = 0.5  # of an uninformed predictor's loss: draws that raise the training loss further have left w*
DEAD_LIMIT = 0.5
RHAT_LIMIT = 1.1
FLOOR_LIMIT = 0.6
ESS_LIMIT = 50.0
RELIABLE = 0.8  # of R, and of K: what two runs agree on, as a correlation over pairs of samples
SIZE_LIMIT = 0.1  # relative standard error of the total variance
UNEVEN_LIMIT = 0.05  # likewise, where the curvature is uneven over draws: the variance is within 10 % then, 19 times of
# 20. What rare draws carry is a worse known error, and such runs at defaults have .08: f = a b x was off by up to 18 %


class Rule(NamedTuple):
    """One row of the table."""

    verdict: str
    broken: Callable[[Any], bool]  # of a run's numbers; comparisons with NaN are false: the unknown accuses nobody
    advice: str  # the number behind the verdict, and one change; a template of the numbers


# In order of how much it spoils: the first broken rule is the verdict.
RULES = (
    Rule(
        "steps rejected",
        lambda n: n.rejects and n.acceptance < REJECTED,
        "the Metropolis test accepts {n.acceptance:.1%} of the steps (least {REJECTED:.0%}); shorten step_size",
    ),
    Rule(
        "no minimum",
        lambda n: below_minimum(n.llc, n.llc_se),
        "draws lower the training loss, by {n.fall:.3g} on average: w* is no minimum of it at this scale, and the "
        "kernel is that of another place; train on, or raise localization",
    ),
    Rule(
        "step too large",
        lambda n: n.stability > STABILITY_LIMIT,
        "the step is {n.stability:.0%} of the longest that is stable at the steepest draw of a thousand (limit "
        "{STABILITY_LIMIT:.0%}); divide lr by {n.too_steep:.1f}",
    ),
    Rule(
        "step too large",
        lambda n: n.foreseen_bias > BIAS_LIMIT and not n.noisy,
        "variances in the worst direction are foreseen to be {n.foreseen_bias:.0%} off (limit {BIAS_LIMIT:.0%}), most "
        "of it by the length of the step; divide lr by {n.too_biased:.1f}",
    ),
    Rule(
        "too much noise",
        lambda n: n.foreseen_bias > BIAS_LIMIT,
        "variances in the worst direction are foreseen to be {n.foreseen_bias:.0%} off (limit {BIAS_LIMIT:.0%}), most "
        "of it by minibatch noise, {n.gradient_noise_ratio:.2g} times the injected noise there; raise batch_size or "
        "divide {n.length} by {n.too_biased:.1f}",
    ),
    Rule(
        "not burned in",
        lambda n: n.growth > GROWN and n.growth_z > GROWN_Z,
        "|w - w*|^2 still grows, by {n.growth:.0%} from the first third of the draws to the last (limit {GROWN:.0%}); "
        "raise num_burnin_steps or localization",
    ),
    Rule(
        "not burned in",
        lambda n: n.burnin_completeness < BURNIN_LIMIT and math.isnan(n.growth),
        "flat directions start with {n.burnin_completeness:.0%} of their stationary variance (least "
        "{BURNIN_LIMIT:.0%}); raise num_burnin_steps or localization",
    ),
    Rule(
        "not burned in",
        lambda n: abs(n.drift) > DRIFT_LIMIT and abs(n.drift_z) > DRIFT_Z_LIMIT,
        "the mean loss still moves: by {n.drift:.1f} standard deviations from the first third of the draws to the "
        "last; raise num_burnin_steps",
    ),
    Rule(
        "diverged",
        lambda n: n.rise > FORGOTTEN * n.uninformed,
        "draws raise the training loss by {n.rise:.2g}, where a predictor that has learnt nothing loses "
        "{n.uninformed:.2g}: they have left the neighborhood of the trained weights; raise localization or n_beta, "
        "or shorten the step",
    ),
    Rule(
        "too little signal",
        lambda n: n.dead_share > DEAD_LIMIT,
        "{n.dead_share:.0%} of the samples have a constant loss; lower n_beta or localization",
    ),
    Rule(
        "chains disagree",
        lambda n: n.rhat > RHAT_LIMIT or n.sample_rhat > RHAT_LIMIT,
        "R-hat is {n.rhat:.2f} for the mean loss and {n.sample_rhat:.2f} for the median sample (limit {RHAT_LIMIT}); "
        "raise num_steps_bw_draws or num_burnin_steps",
    ),
    Rule(
        "too few draws for these neighbors",
        lambda n: n.noise_floor > FLOOR_LIMIT,
        "chance alone reaches correlations of {n.noise_floor:.2f} (limit {FLOOR_LIMIT}); raise num_draws, or "
        "num_steps_bw_draws if draws are autocorrelated",
    ),
    Rule(
        "too few draws",
        lambda n: n.sample_ess < ESS_LIMIT or n.ess < ESS_LIMIT,
        "the median sample has {n.sample_ess:.0f} effective draws and the mean loss {n.ess:.0f} (limit "
        "{ESS_LIMIT:.0f}); raise num_draws, or num_steps_bw_draws if draws are autocorrelated",
    ),
    Rule(
        "not determined",
        lambda n: n.reliability < RELIABLE,
        "R would correlate {n.reliability:.2f} with that of another such run (least {RELIABLE}), K "
        "{n.reliability_kernel:.2f}; draw {n.more_for_both} as many",
    ),
    Rule(
        "not determined",
        lambda n: n.reliability_kernel < RELIABLE,
        "K would correlate {n.reliability_kernel:.2f} with that of another such run (least {RELIABLE}), R "
        "{n.reliability:.2f}; draw {n.more_for_both} as many",
    ),
    Rule(
        "not determined",
        lambda n: n.unevenness > UNEVEN and n.size_error > UNEVEN_LIMIT,
        "the losses' total variance is known to {n.size_error:.1%} (limit {UNEVEN_LIMIT:.0%} if rare draws carry it: "
        "the steepest of a thousand has {n.unevenness:.1f} times the mean curvature); draw {n.more_for_size} as many",
    ),
    Rule(
        "not determined",
        lambda n: n.size_error > SIZE_LIMIT,
        "the losses' total variance is known to {n.size_error:.0%} (limit {SIZE_LIMIT:.0%}); draw {n.more_for_size} as "
        "many",
    ),
    Rule(
        "unchecked",
        lambda n: math.isnan(n.rhat),
        "R-hat needs at least 4 draws that vary; raise num_draws",
    ),
    Rule(
        "unchecked",
        lambda n: not (n.sample_rhat <= RHAT_LIMIT and n.sample_ess >= ESS_LIMIT),
        "no watched sample's loss varies enough to be checked",
    ),
    Rule(
        "good",
        lambda n: True,
        "chains agree (R-hat {n.rhat:.2f}), the median sample has {n.sample_ess:.0f} effective draws, and another such "
        "run's R would correlate {n.reliability:.2f}",
    ),
)  # fmt: skip


def judge(numbers: Mapping[str, Any], *, rejects: bool = False) -> tuple[str, str]:
    """(verdict, advice): the first thing that is wrong, with the number behind it and one change to make.

    Args:
        numbers: by the names of `Diagnostics`; None where unknown.
        rejects: whether the acceptance is that of the chain's own steps.
    """
    n = SimpleNamespace(**{key: math.nan if value is None else value for key, value in numbers.items()})
    n.rejects = rejects
    n.fall = -n.rise
    n.noisy = n.gradient_noise_ratio > n.foreseen_bias / 2
    n.length = "step_size" if math.isnan(n.discretisation) else "lr"
    n.too_steep, n.too_biased = n.stability / STEEPEST_BUDGET, n.foreseen_bias / BIAS_BUDGET
    needed = [
        times_as_many(found, RELIABLE) for found in (n.reliability, n.reliability_kernel) if not math.isnan(found)
    ]
    n.more_for_both = _times(max(needed, default=math.nan))
    n.more_for_size = _times((n.size_error / (UNEVEN_LIMIT if n.unevenness > UNEVEN else SIZE_LIMIT)) ** 2)
    rule = next(rule for rule in RULES if rule.broken(n))
    return rule.verdict, rule.advice.format(n=n, **LIMITS)


def below_minimum(llc: float | None, se: float | None) -> bool:
    """Whether a learning coefficient is significantly negative: draws lower the loss that w* should be a minimum of."""
    return llc is not None and se is not None and llc < -LLC_Z * se


def _times(more: float) -> str:
    return f"{more:.1f} times" if more < MOST_TIMES else f"more than {MOST_TIMES} times"


MOST_TIMES = 100  # as many draws that an advice names
LIMITS = {name: value for name, value in globals().items() if name.isupper() and isinstance(value, float)}
