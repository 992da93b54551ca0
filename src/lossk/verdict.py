"""What is wrong with a run, if anything: rules over its numbers, and the limits that they keep."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lossk.bias import BIAS_BUDGET, STEEPEST_BUDGET
from lossk.reliability import times_as_many

RHAT_LIMIT = 1.1
BIAS_LIMIT = 0.1  # of the foreseen excess of a variance, discretisation and noise together: twice what "auto" allows
STABILITY_LIMIT = 1.0  # of eps a / 4 at the steepest draw of a thousand, where the step is not stable from there on
BURNIN_LIMIT = 0.9
ESS_LIMIT = 50.0
FLOOR_LIMIT = 0.6
DRIFT_LIMIT, DRIFT_Z_LIMIT = 0.7, 4.0
FORGOTTEN = 0.5  # of an uninformed predictor's loss: draws that raise the training loss further have left w*


RELIABLE = 0.8  # of R, and of K: what two runs agree on, as a correlation over pairs of samples
SIZE_LIMIT = 0.1  # relative standard error of the total variance
GROWN, GROWN_Z = 0.15, 3.0  # of |w - w*|^2 over the run: flat directions are still spreading
REJECTED = 0.1  # acceptance of a chain's own steps
LLC_Z = 2.0  # standard errors below 0 from which w* is no minimum


def judge(numbers: Mapping[str, Any], *, rejects: bool = False) -> tuple[str, str]:
    """The first thing that is wrong, in order of how much it spoils, with the number behind it and one change.

    Args:
        rejects: whether the acceptance is that of the chain's own steps.
    """
    n = {key: (math.nan if value is None else value) for key, value in numbers.items()}
    # Comparisons with NaN are false: an unknown number accuses nobody.
    if rejects and n["acceptance"] < REJECTED:
        return "steps rejected", (
            f"the Metropolis test accepts {100 * n['acceptance']:.0f} % of the steps; shorten step_size or num_leapfrog"
        )
    if n["llc"] < -LLC_Z * n["llc_se"]:
        return "no minimum", (
            f"draws lower the training loss, by {-n['rise']:.3g} on average: w* is no minimum of it at this scale, and "
            "the kernel is that of another place; train on, or raise localization"
        )
    if n["stability"] > STABILITY_LIMIT:
        return "step too large", (
            f"the step is {100 * n['stability']:.0f} % of the longest stable at the steepest draw of a thousand "
            f"(limit {100 * STABILITY_LIMIT:.0f} %); divide lr by {n['stability'] / STEEPEST_BUDGET:.1f}"
        )
    if n["foreseen_bias"] > BIAS_LIMIT:
        return _biased(n)
    still = n["growth"] > GROWN and n["growth_z"] > GROWN_Z
    if still or (n["burnin_completeness"] < BURNIN_LIMIT and math.isnan(n["growth"])):
        return _spreading(n, still)
    if abs(n["drift"]) > DRIFT_LIMIT and abs(n["drift_z"]) > DRIFT_Z_LIMIT:
        return "not burned in", (
            f"the mean loss still moves: by {n['drift']:.1f} standard deviations from the first third of the draws to "
            "the last; raise num_burnin_steps"
        )
    if n["rise"] > FORGOTTEN * n["uninformed"]:
        return "diverged", (
            f"draws raise the training loss by {n['rise']:.2g}, where a predictor that has learnt nothing loses "
            f"{n['uninformed']:.2g}: they have left the neighbourhood of the trained weights; raise localization or "
            "n_beta, or shorten the step"
        )
    if n["dead_share"] > 0.5:
        share = 100 * n["dead_share"]
        return "too little signal", f"{share:.0f} % of the samples have a constant loss; lower n_beta or localization"
    if n["rhat"] > RHAT_LIMIT or n["sample_rhat"] > RHAT_LIMIT:
        return "chains disagree", (
            f"R-hat is {n['rhat']:.2f} for the mean loss and {n['sample_rhat']:.2f} for the median sample "
            f"(limit {RHAT_LIMIT}); raise num_steps_bw_draws or num_burnin_steps"
        )
    if n["noise_floor"] > FLOOR_LIMIT:
        return "too few draws for these neighbours", (
            f"chance alone reaches correlations of {n['noise_floor']:.2f} (limit {FLOOR_LIMIT}); "
            "raise num_draws, or num_steps_bw_draws if draws are autocorrelated"
        )
    if n["sample_ess"] < ESS_LIMIT or n["ess"] < ESS_LIMIT:
        return "too few draws", (
            f"the median sample has {n['sample_ess']:.0f} effective draws and the mean loss {n['ess']:.0f} "
            f"(limit {ESS_LIMIT:.0f}); raise num_draws, or num_steps_bw_draws if draws are autocorrelated"
        )
    if n["size_error"] > SIZE_LIMIT:
        return "not determined", (
            f"the total variance has a standard error of {100 * n['size_error']:.0f} % over chains (limit "
            f"{100 * SIZE_LIMIT:.0f} %); raise num_draws or num_chains, or localization if the losses are heavy-tailed"
        )
    for name, what in (("reliability", "R"), ("reliability_kernel", "K")):
        if n[name] < RELIABLE:
            more = times_as_many(n[name], RELIABLE)
            much = f"{more:.1f} times as many" if more < 100 else "many more"
            return "not determined", (
                f"{what} would correlate {n[name]:.2f} with that of another such run (limit {RELIABLE}); draw {much}"
            )
    if math.isnan(n["rhat"]):
        return "unchecked", "R-hat needs at least 4 draws that vary; raise num_draws"
    if n["sample_rhat"] <= RHAT_LIMIT and n["sample_ess"] >= ESS_LIMIT:
        ess = n["sample_ess"]
        return "good", f"chains agree (R-hat {n['rhat']:.2f}) and the median sample has {ess:.0f} effective draws"
    return "unchecked", "no watched sample's loss varies enough to be checked"


def _spreading(n: Mapping[str, Any], still: bool) -> tuple[str, str]:
    share = f"flat directions start with {100 * n['burnin_completeness']:.0f} % of their stationary variance"
    if still:
        share = f"|w - w*|^2 still grows, by {100 * n['growth']:.0f} % from the first third of the draws to the last"
    return "not burned in", f"{share}; raise num_burnin_steps or localization"


def _biased(n: Mapping[str, Any]) -> tuple[str, str]:
    """Whether the step or the minibatch is to blame for the foreseen bias, and what would mend it."""
    bias, noise = n["foreseen_bias"], n["gradient_noise_ratio"]
    said = f"variances in the worst direction are foreseen to be {100 * bias:.0f} % too large (limit "
    said += f"{100 * BIAS_LIMIT:.0f} %)"
    if noise > bias / 2:
        return "too much noise", (
            f"{said}: minibatch noise is {noise:.2g} times the injected noise there; raise batch_size or divide lr by "
            f"{bias / BIAS_BUDGET:.1f}"
        )
    return "step too large", f"{said}; divide lr by {bias / BIAS_BUDGET:.1f}"
