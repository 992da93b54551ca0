"""BAOAB's automatic law and step from what a pilot measured, and when it is recommended."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

import lossk
from lossk.diagnostics.bias import BIAS_BUDGET
from lossk.pilot.automatic_baoab import choose_baoab, longest_step, steps_to_forget
from lossk.pilot.pilot import Pilot, batch_factor
from lossk.pilot.step_choice import Way, batches
from lossk.run import choose

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


def test_noise_of_kicks_shortens_the_step_and_leaves_the_law() -> None:
    """A minibatch of 100 of 500, given: at most 5 % of a variance, as SGLD's; the slowest mode then takes longer."""
    asked = lossk.BAOAB(n_beta=200.0, localization=50.0, batch_size=100)
    chosen, pilot, reasons = choose_baoab(asked, NOISY, 500, 1000)
    assert (chosen.localization, chosen.batch_size) == (50.0, 100)
    assert pilot.batch_factor == pytest.approx(400 / (100 * 499))
    assert float(chosen.step_size) < 1 / math.sqrt(200 * 5 + 50)
    ratio = choose.momentum_noise_ratio(chosen, pilot)
    assert ratio is not None
    assert 0.4 * BIAS_BUDGET < ratio < 1.02 * BIAS_BUDGET
    assert chosen.num_steps_bw_draws == memory(pilot, 50.0) > memory(FULL, 50.0)
    assert not [why for why in reasons if why.startswith("localization")]


def test_the_curvature_of_the_steepest_draws_bounds_the_step() -> None:
    steep = dataclasses.replace(FULL, drawn_curvature=6.0, drawn_steepest=20.0, drawn_localization=50.0)
    assert longest_step(FULL, 50.0, controlled=False)[0] == pytest.approx(1 / math.sqrt(200 * 5 + 50))
    assert longest_step(steep, 50.0, controlled=False)[0] == pytest.approx(1 / math.sqrt(200 * 20 + 50))


@pytest.mark.parametrize("num_weights", [6, 10_000, 10**8])
def test_the_minibatch_is_the_cheapest_for_the_slowest_mode(num_weights: int) -> None:
    """Passes of a small network are nothing beside a step's own time; a large one pays for each sample."""
    asked = lossk.BAOAB(n_beta=200.0, localization=50.0)
    for pilot in (dataclasses.replace(NOISY, control_variance=0.01), NOISY):

        def price(batch: int, pilot: Pilot = pilot) -> float:
            here = dataclasses.replace(pilot, batch_factor=batch_factor(20_000, batch))
            return Way(batch, True, corrected=False).cost(20_000, num_weights) * memory(here, 50.0)

        found, _, reasons = choose_baoab(asked, pilot, 20_000, num_weights)
        assert found.batch_size is not None
        assert price(int(found.batch_size)) == min(price(batch) for batch in batches("auto", 20_000))
        assert any(why.startswith("batch_size") for why in reasons) == (found.batch_size != 256)
    assert found.batch_size > 256 or num_weights > 6


def test_its_automatic_law_is_that_of_sgld() -> None:
    torch.manual_seed(3)
    x = torch.randn(120, 4)
    data = (x, (x[:, 0] + 0.5 * torch.randn(120) > 0).long())
    model = nn.Linear(4, 2)
    laws = set()
    for sampler in (lossk.SGLD(), lossk.BAOAB(), lossk.BAOAB(batch_size=8), lossk.SGLD(batch_size=4)):
        traces = lossk.sample_losses(model, data, sampler=sampler, num_chains=1, num_draws=2, progress=False)
        laws.add(traces.meta["sampler"]["localization"])
    assert len(laws) == 1


def test_baoab_is_praised_only_where_it_is_known_to_serve_better() -> None:
    """Not where nobody has measured what noise its kicks would have, nor where that holds its step back."""
    assert choose._praise_of_momentum(SGLD, FULL)
    assert not choose._praise_of_momentum(SGLD, dataclasses.replace(NOISY, control_variance=None))
    assert not choose._praise_of_momentum(SGLD, dataclasses.replace(NOISY, control_variance=100.0))
