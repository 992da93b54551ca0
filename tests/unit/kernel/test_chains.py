"""Kernels with a chain left out, against kernels built without it."""

from __future__ import annotations

import pytest
import torch

import lossk
from lossk.kernel.chains import has_chains, leave_one_chain_out
from planted import planted_traces


def test_same_as_never_having_had_the_chain() -> None:
    traces = planted_traces(torch.arange(37) % 3, num_draws=20, dead=2)
    kernel = lossk.LossKernel.from_traces(traces)
    for chain, found in enumerate(leave_one_chain_out(kernel)):
        others = [c for c in range(4) if c != chain]
        expected = lossk.LossKernel.from_traces(lossk.LossTraces(traces.losses[others]))
        torch.testing.assert_close(found.variance, expected.variance, rtol=1e-6, atol=0)
        torch.testing.assert_close(found.mean_loss, expected.mean_loss)
        torch.testing.assert_close(found.correlation(), expected.correlation(), rtol=0, atol=1e-5)
        assert found.num_chains == 3
        assert found.dead.tolist() == expected.dead.tolist()


def test_what_does_not_know_its_chains_says_so(problem, build) -> None:
    tiled = build(problem.model(), problem.data)
    assert not has_chains(tiled)
    with pytest.raises(ValueError, match="got tiles, 'chain', 2"):
        leave_one_chain_out(tiled)
    pooled = lossk.LossKernel.from_traces(planted_traces(torch.arange(9) % 3), centering="pooled")
    with pytest.raises(ValueError, match="got factor, 'pooled', 4"):
        leave_one_chain_out(pooled)
