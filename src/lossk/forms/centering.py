"""Traces to factor: each sample's losses centered and divided by its scale, a stripe of samples at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lossk.forms.blocks import Moments, power_of_two_near

TINY = torch.finfo(torch.float64).tiny
BLOCK = 2**16  # losses turned to float64 at a time


class Centered(NamedTuple):
    """n samples' part of the factor, and what is known of each of them; float64 unless noted."""

    factor: Tensor  # [C T, n] in the dtype asked for: (loss - center) / scale
    mean: Tensor  # [n], nats
    variance: Tensor  # [n], nats^2
    scale: Tensor  # [n]
    chain_mean: Tensor  # [C, n], nats
    lag1: Tensor  # [n]


def degrees_of_freedom(num_chains: int, num_draws: int, centering: str) -> int:
    """What the sum of products of deviations is divided by."""
    return num_chains * (num_draws - 1) if centering == "chain" else num_chains * num_draws - 1


def center(losses: Tensor, centering: str, dtype: torch.dtype = torch.float32) -> Centered:
    """Center and scale losses [C, T, n] float32; deviations are formed in float64 and rounded once scaled."""
    num_chains, num_draws, num_samples = losses.shape
    chain_mean = torch.stack([chain.double().mean(dim=0) for chain in losses])
    mean = chain_mean.mean(dim=0)
    about = chain_mean if centering == "chain" else mean.expand_as(chain_mean)
    variance = torch.zeros(num_samples, dtype=torch.float64, device="cpu")
    within, products = torch.zeros_like(variance), torch.zeros_like(variance)
    for c in range(num_chains):
        deviations = losses[c].double() - chain_mean[c]
        within += deviations.square().sum(dim=0)
        products += (deviations[1:] * deviations[:-1]).sum(dim=0)
        variance += (losses[c].double() - about[c]).square().sum(dim=0)
    variance /= degrees_of_freedom(num_chains, num_draws, centering)
    scale = torch.where(variance > 0, power_of_two_near(variance.sqrt()), 1.0)
    factor = torch.empty(num_chains * num_draws, num_samples, dtype=dtype, device="cpu")
    for c in range(num_chains):
        factor[c * num_draws : (c + 1) * num_draws] = (losses[c].double() - about[c]) / scale
    lag1 = torch.where(within > 0, products / within.clamp(min=TINY), 0.0)
    return Centered(factor, mean, variance, scale, chain_mean, lag1)


def empty_moments(num_chains: int, num_draws: int, num_samples: int, centering: str) -> Moments:
    """Moments to be filled by `note`."""
    mean, variance, scale, lag1 = (torch.empty(num_samples, dtype=torch.float64, device="cpu") for _ in range(4))
    chain_mean = torch.empty(num_chains, num_samples, dtype=torch.float64, device="cpu")
    return Moments(mean, variance, scale, chain_mean, lag1, num_chains, num_draws, centering)


def note(moments: Moments, span: slice, centered: Centered) -> None:
    """Write the moments of the samples of `span`, in place."""
    for name in ("mean", "variance", "scale", "lag1"):
        getattr(moments, name)[span] = getattr(centered, name)
    moments.chain_mean[:, span] = centered.chain_mean


def row_means(chain: Tensor) -> Tensor:
    """[T] float64 of [T, N], some rows at a time: a copy of all in float64 would be twice their memory."""
    return torch.cat([rows.double().mean(dim=1) for rows in chain.split(max(1, BLOCK // chain.shape[1]))])


def never_varies(chain: Tensor) -> Tensor:
    """[N] bool of [T, N]."""
    first, same = chain[0], torch.ones(chain.shape[1], dtype=torch.bool, device=chain.device)
    for row in chain:
        same &= row == first
    return same
