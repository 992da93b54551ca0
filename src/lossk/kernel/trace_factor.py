"""Traces to a kernel's factor, beside them or in their own memory, with the moments and the diagnostics."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lossk.diagnostics.diagnostics import Diagnostics, diagnose_traces
from lossk.forms.blocks import FactorBlocks, Moments, tile_spans
from lossk.forms.centering import center, degrees_of_freedom, empty_moments, note
from lossk.forms.watched import watched_bytes, watched_in
from lossk.kernel.neighbors import median_noise_floor

if TYPE_CHECKING:
    from lossk.kernel.traces import LossTraces

STRIPE, LEAST = 4096, 64  # samples centered at a time, at most and at least


def factor_of(
    traces: LossTraces, centering: str, *, overwrite: bool = False
) -> tuple[FactorBlocks, Moments, Diagnostics]:
    """The factor [C T, N] float32 of centered traces, the moments of their samples, and their diagnostics.

    Args:
        overwrite: put the factor into the traces' own memory: their losses are then lost.
    """
    losses = traces.losses  # [C, T, N] float32
    num_chains, num_draws, num_samples = losses.shape
    diagnose = diagnose_traces(traces)  # reads the losses before they are overwritten
    shape = (num_chains * num_draws, num_samples)
    factor = losses.view(shape) if overwrite else torch.empty(shape, dtype=torch.float32, device="cpu")
    moments = empty_moments(num_chains, num_draws, num_samples, centering)
    for span in tile_spans(num_samples, stripe_of(num_samples, num_chains)):
        centered = center(losses[:, :, span], centering)
        factor[:, span] = centered.factor
        note(moments, span, centered)
    blocks = FactorBlocks(factor, degrees_of_freedom(num_chains, num_draws, centering))
    watched = watched_in(blocks, moments)
    assert watched is not None
    return blocks, moments, diagnose(median_noise_floor(moments, watched))


def stripe_of(num_samples: int, num_chains: int) -> int:
    """Samples centered at a time: what is made of them takes about a chain's traces of a quarter of all samples."""
    fitting = num_samples // (4 * (num_chains + 10))
    return min(max(fitting // LEAST * LEAST, LEAST), STRIPE)


DIAGNOSING = 2**21  # bytes that diagnosing takes beside the watched traces: kernels of 64 of them, chance


def making_bytes(num_samples: int, num_chains: int, num_draws: int) -> int:
    """What `factor_of` takes beside the traces that it overwrites: a stripe's float64 deviations, the moments."""
    stripe = min(stripe_of(num_samples, num_chains), num_samples)
    deviations = (4 * num_chains + 40) * num_draws * stripe
    moments = 8 * (num_chains + 12) * num_samples + 8 * (2 * num_chains + 8) * stripe
    watched = watched_bytes(num_samples, num_chains * num_draws)  # of the diagnostics
    return deviations + moments + watched + DIAGNOSING
