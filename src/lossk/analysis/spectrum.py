"""Spectrum of a kernel: its leading directions, how many there are in effect, and the samples that make them up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lossk.analysis.inputs import check_kernel
from lossk.checks import check_integer
from lossk.forms.blocks import FactorBlocks
from lossk.records import check_record

if TYPE_CHECKING:
    from lossk.kernel.kernel import LossKernel

BAND = 1024  # rows of a tile in float64 at a time


class EigenSamples(NamedTuple):
    """The samples with the largest entries of an eigenvector."""

    index: Tensor  # type: ignore[assignment]  # [m] int64, largest |entry| first
    entry: Tensor  # [m] float64; the sign is relative: samples of one sign move together, of two against each other


@dataclass(frozen=True)
class Spectrum:
    """Leading eigenpairs of a kernel and what they are of the whole."""

    eigenvalues: Tensor  # [k] float64, nats^2, descending
    eigenvectors: Tensor  # [N, k] float64, of length 1
    share: Tensor  # [k] float64: of the trace, in [0, 1]
    trace: float  # nats^2: the sum of all variances
    participation_ratio: float  # (trace K)^2 / |K|_F^2, from 1 to the rank: how many directions hold the variance

    def __post_init__(self) -> None:
        check_record(self)

    def eigen_samples(self, j: int, m: int = 10) -> EigenSamples:
        """The m samples with the largest |entry| in eigenvector j."""
        j = check_integer("j", j, 0, len(self.eigenvalues) - 1)
        m = check_integer("m", m, 0)
        vector = self.eigenvectors[:, j]
        index = torch.argsort(vector.abs(), descending=True, stable=True)[:m]
        return EigenSamples(index, vector[index])


def spectrum(kernel: LossKernel, k: int = 20) -> Spectrum:
    """The k leading eigenpairs (`kernel.eigsh`) and the participation ratio of the whole kernel.

    |K|_F is exact: in factor form from the draws' Gram matrix (as |F'F|_F = |F F'|_F) where that is smaller than K,
    else from the tiles, streamed. A kernel of few draws cannot show more directions than D = C (T - 1).

    Args:
        k: at most N; more than the kernel's rank gives zeros.
    """
    kernel, k = check_kernel("kernel", kernel), check_integer("k", k, 1)
    values, vectors = kernel.eigsh(min(k, kernel.num_samples))
    trace = float(kernel.variance.sum())
    norm2 = frobenius_squared(kernel)
    share = values / trace if trace > 0 else torch.zeros_like(values)
    return Spectrum(values, vectors, share, trace, trace**2 / norm2 if norm2 > 0 else 0.0)


def frobenius_squared(kernel: LossKernel) -> float:
    """|K|_F^2 in nats^4, the diagonal that of `kernel.variance`, without forming K."""
    blocks, scale = kernel.contents.blocks, kernel.contents.moments.scale
    if isinstance(blocks, FactorBlocks) and blocks.num_rows <= min(kernel.num_samples, 8192):
        gram = torch.zeros(blocks.num_rows, blocks.num_rows, dtype=torch.float64, device="cpu")
        for span, stripe in blocks.stripes():
            part = stripe.double().mul_(scale[span])
            gram.addmm_(part, part.T)
        return float(gram.div_(blocks.freedom).square().sum())
    total = 0.0
    std = kernel.variance.sqrt()
    starts = [kernel.tile * i for i in range(-(-kernel.num_samples // kernel.tile))]
    for i, j, tile in kernel.correlation_tiles():  # R does not underflow where K would
        for start in range(0, len(tile), BAND):
            part = tile[start : start + BAND].double()
            part *= std[starts[i] + start :][: len(part)].unsqueeze(1) * std[starts[j] :][: tile.shape[1]]
            total += float(part.square().sum()) * (1 if i == j else 2)
    return total
