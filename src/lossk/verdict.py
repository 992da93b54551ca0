"""What is wrong with a run, if anything: rules over its numbers, and the limits that they keep."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lossk.bias import BIAS_BUDGET, STEEPEST_BUDGET

RHAT_LIMIT = 1.1
BIAS_LIMIT = 0.1  # of the foreseen excess of a variance, discretisation and noise together: twice what "auto" allows
STABILITY_LIMIT = 1.0  # of eps a / 4 at the steepest draw of a thousand, where the step is not stable from there on
BURNIN_LIMIT = 0.9
ESS_LIMIT = 50.0
FLOOR_LIMIT = 0.6
DRIFT_LIMIT, DRIFT_Z_LIMIT = 0.7, 4.0
FORGOTTEN = 0.5  # of an uninformed predictor's loss: draws that raise the training loss further have left w*


def judge(numbers: Mapping[str, Any]) -> tuple[str, str]:
    """The first thing that is wrong, in order of how much it spoils, with the number behind it and one change."""
    n = {key: (math.nan if value is None else value) for key, value in numbers.items()}
    # Comparisons with NaN are false: an unknown number accuses nobody.
    if n["stability"] > STABILITY_LIMIT:
        return "step too large", (
            f"the step is {100 * n['stability']:.0f} % of the longest stable at the steepest draw of a thousand "
            f"(limit {100 * STABILITY_LIMIT:.0f} %); divide lr by {n['stability'] / STEEPEST_BUDGET:.1f}"
        )
    if n["foreseen_bias"] > BIAS_LIMIT:
        return _biased(n)
    if n["burnin_completeness"] < BURNIN_LIMIT:
        share = 100 * n["burnin_completeness"]
        return "not burned in", (
            f"flat directions start with {share:.0f} % of their stationary variance; "
            "raise num_burnin_steps or localization"
        )
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
    if math.isnan(n["rhat"]):
        return "unchecked", "R-hat needs at least 4 draws that vary; raise num_draws"
    if n["sample_rhat"] <= RHAT_LIMIT and n["sample_ess"] >= ESS_LIMIT:
        ess = n["sample_ess"]
        return "good", f"chains agree (R-hat {n['rhat']:.2f}) and the median sample has {ess:.0f} effective draws"
    return "unchecked", "no watched sample's loss varies enough to be checked"


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
