"""A kernel's factor in the memory of its traces: the same numbers, and no second copy of them."""

from __future__ import annotations

import pytest
import torch

import lossk
from lossk.kernel.kernel import LossKernel
from lossk.kernel.trace_factor import LEAST, STRIPE, factor_of, making_bytes, stripe_of
from lossk.plan.pass_memory import peak_of


def traces(chains: int, draws: int, samples: int) -> lossk.LossTraces:
    generator = torch.Generator(device="cpu").manual_seed(3)
    losses = torch.rand(chains, draws, samples, generator=generator, dtype=torch.float32, device="cpu")
    losses[:, :, 1] = 0.5
    return lossk.LossTraces(losses)


@pytest.mark.parametrize("centering", ["chain", "pooled"])
@pytest.mark.parametrize("samples", [3, 1000])
def test_the_same_factor_where_it_takes_the_place_of_the_traces(samples: int, centering: str) -> None:
    beside, taken = traces(3, 8, samples), traces(3, 8, samples)
    apart = LossKernel.from_traces(beside, centering=centering)
    inside = LossKernel._of_traces(taken, centering, overwrite=True)
    assert torch.equal(inside.contents.blocks.factor, apart.contents.blocks.factor)  # type: ignore[attr-defined]
    assert inside.contents.blocks.factor.data_ptr() == taken.losses.data_ptr()  # type: ignore[attr-defined]
    assert torch.equal(inside.variance, apart.variance)
    assert str(inside.diagnostics) == str(apart.diagnostics)
    assert torch.equal(beside.losses, traces(3, 8, samples).losses)


@pytest.mark.parametrize(("chains", "draws", "samples"), [(4, 50, 8000), (16, 20, 4000), (1, 200, 5000)])
def test_it_takes_what_the_plan_says(chains: int, draws: int, samples: int) -> None:
    given = traces(chains, draws, samples)
    peak = peak_of(lambda: factor_of(given, "chain", overwrite=True))
    assert peak <= making_bytes(samples, chains, draws) < given.losses.nbytes


def test_stripes() -> None:
    assert stripe_of(10, 4) == LEAST
    assert stripe_of(10**7, 4) == STRIPE
    assert stripe_of(50_000, 4) == 832
