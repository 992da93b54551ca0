"""BAOAB's automatic law and step from what a pilot measured, and when it is recommended."""

from __future__ import annotations

import dataclasses
import math

import pytest

import lossk
from lossk import choose, tune
from lossk.pilot import Pilot
from lossk.tune_baoab import afford, choose_baoab, longest_step, steps_to_forget

NOISY = Pilot(
    curvature=5.0, gradient_variance=3.0, n_beta=200.0, batch_factor=0.003, num_samples=500,
    control_variance=4.0, control_localization=100.0,
)  # fmt: skip
FULL = dataclasses.replace(NOISY, batch_factor=0.0)
SGLD = lossk.SGLD(
    lr=5e-4, n_beta=200.0, localization=50.0, num_burnin_steps=100, num_steps_bw_draws=5, control_variate=True
)


def memory(pilot: Pilot, localization: float) -> int:
    return steps_to_forget(pilot, localization, controlled=True)


def test_the_law_is_the_least_local_that_the_noise_of_kicks_affords() -> None:
    """25 gradients are 12 steps of two; a tenth less localization would need more."""
    asked = lossk.BAOAB(n_beta=200.0, localization=50.0)
    found, why = afford(asked, NOISY)
    localization = float(found.localization)
    assert localization > 50.0
    assert memory(NOISY, 50.0) > 12
    assert memory(NOISY, localization / 1.1) > 12 >= memory(NOISY, localization)
    assert why == [f"localization = {localization:.4g}: flat directions then forget within 12 steps of 2 gradients"]
    chosen, _ = choose_baoab(found, NOISY)
    assert chosen.num_steps_bw_draws == memory(NOISY, localization)
    ratio = choose.momentum_noise_ratio(chosen, NOISY)
    assert ratio is not None
    assert 0.75 * tune.NOISE_BUDGET < ratio < 1.02 * tune.NOISE_BUDGET


def test_without_minibatch_noise_the_law_is_that_of_sgld() -> None:
    asked = lossk.BAOAB(n_beta=200.0, localization=50.0, batch_size=None)
    assert afford(asked, FULL) == (asked, [])
    assert longest_step(FULL, 50.0, controlled=False)[0] == pytest.approx(1 / math.sqrt(200 * 5 + 50))


def test_as_many_steps_between_draws_as_are_asked_for_are_affordable() -> None:
    asked = lossk.BAOAB(n_beta=200.0, localization=50.0, num_steps_bw_draws=memory(NOISY, 50.0))
    assert afford(asked, NOISY) == (asked, [])


def test_baoab_is_praised_only_where_it_is_known_to_serve_better() -> None:
    """Not where nobody has measured what noise its kicks would have, nor where that holds its step back."""
    assert choose._praise_of_momentum(SGLD, FULL)
    assert not choose._praise_of_momentum(SGLD, dataclasses.replace(NOISY, control_variance=None))
    assert not choose._praise_of_momentum(SGLD, dataclasses.replace(NOISY, control_variance=100.0))
