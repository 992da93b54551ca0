"""A kernel with one of its chains left out: how far what is read from it hangs on the chain."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from lossk.forms.blocks import FactorBlocks
from lossk.kernel.kernel import LossKernel


class SomeDraws(FactorBlocks):
    """Some rows of a factor; the factor itself stays where it is."""

    def __init__(self, whole: FactorBlocks, rows: Tensor, freedom: int) -> None:
        self._whole, self._rows = whole, rows
        self.num_rows, self.num_samples, self.tile = len(rows), whole.num_samples, whole.tile
        self.freedom = freedom

    @property
    def dtype(self) -> torch.dtype:
        return self._whole.dtype

    def take(self, index: Tensor) -> Tensor:
        return self._whole.take(index)[self._rows]

    def stripe(self, i: int) -> Tensor:
        return self._whole.stripe(i)[self._rows]


def has_chains(kernel: LossKernel) -> bool:
    """Whether its chains can be told apart: in factor form, centered by chain, at least two of them."""
    return kernel.form == "factor" and kernel.centering == "chain" and kernel.num_chains >= 2


def leave_one_chain_out(kernel: LossKernel) -> Iterator[LossKernel]:
    """The C kernels of all chains but one, in the order of the chain left out; from a kernel in factor form.

    Each reads the factor of the whole. Lag-1 autocorrelations are those of the whole.

    Raises:
        ValueError: tiles do not know chains, nor do traces centered on a pooled mean; or there is one chain.
    """
    if not has_chains(kernel):
        raise ValueError(
            "chains are told apart in a kernel from traces (LossKernel.from_traces), centering='chain', of at least "
            f"2 chains, got {kernel.form}, {kernel.centering!r}, {kernel.num_chains}"
        )
    return (_without(kernel, chain) for chain in range(kernel.num_chains))


def _without(kernel: LossKernel, chain: int) -> LossKernel:
    whole, moments = kernel.contents.blocks, kernel.contents.moments
    assert isinstance(whole, FactorBlocks)
    others = [c for c in range(kernel.num_chains) if c != chain]
    rows = torch.arange(whole.num_rows, device="cpu").reshape(kernel.num_chains, -1)[others].reshape(-1)
    blocks = SomeDraws(whole, rows, len(others) * (kernel.num_draws - 1))
    variance = torch.zeros_like(moments.variance)
    for span, stripe in blocks.stripes():
        variance[span] = stripe.double().square().sum(dim=0) / blocks.freedom
    remaining = dataclasses.replace(
        moments,
        mean=moments.chain_mean[others].mean(dim=0),
        variance=variance * moments.scale.square(),
        chain_mean=moments.chain_mean[others],
        num_chains=len(others),
    )
    return LossKernel(blocks, remaining)
