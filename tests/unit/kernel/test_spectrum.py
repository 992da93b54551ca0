"""Eigenpairs, participation ratio and eigen-samples against a dense solver."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import lossk
from lossk.analysis.spectrum import frobenius_squared, spectrum
from planted import planted_kernel, planted_traces


def participation(k: np.ndarray) -> float:
    return float(np.trace(k) ** 2 / np.square(k).sum())


@pytest.mark.parametrize("num_draws", [3, 30])  # fewer draws than samples, and more
def test_factor_form_against_dense(num_draws: int) -> None:
    kernel = planted_kernel(torch.arange(53) % 4, num_draws=num_draws)
    dense = kernel.to_numpy().astype(np.float64)
    found = spectrum(kernel, 5)
    values = np.linalg.eigvalsh(dense)[::-1]
    np.testing.assert_allclose(found.eigenvalues.numpy(), values[:5], rtol=1e-5, atol=1e-6 * values[0])
    assert found.participation_ratio == pytest.approx(participation(dense), rel=1e-5)
    assert found.trace == pytest.approx(np.trace(dense), rel=1e-6)
    assert found.share.tolist() == pytest.approx((values[:5] / np.trace(dense)).tolist(), rel=1e-4)


@pytest.mark.parametrize("tile", [16, 32])  # 21 samples: ragged, and one tile
def test_tiles_against_dense(tile: int, problem, build) -> None:
    kernel = build(problem.model(), problem.data, tile=tile)
    dense = kernel.to_numpy().astype(np.float64)
    assert spectrum(kernel, 3).participation_ratio == pytest.approx(participation(dense), rel=1e-5)
    assert frobenius_squared(kernel) == pytest.approx(float(np.square(dense).sum()), rel=1e-5)


def test_one_direction_and_the_identity() -> None:
    wave = torch.sin(torch.arange(40.0)).reshape(2, 20, 1)
    one = lossk.LossKernel.from_traces(lossk.LossTraces(1 + wave * torch.tensor([1.0, -2.0, 3.0])))
    assert spectrum(one, 2).participation_ratio == pytest.approx(1.0, rel=1e-6)
    assert spectrum(one, 1).share.item() == pytest.approx(1.0, rel=1e-6)
    equal = 10.0 ** torch.zeros(400)
    noise = torch.randn(4, 2000, 400, generator=torch.Generator().manual_seed(0)) * equal
    many = lossk.LossKernel.from_traces(lossk.LossTraces(noise))
    # Marchenko and Pastur: of the identity in n dimensions, D draws show n / (1 + n / D) directions.
    assert spectrum(many, 1).participation_ratio == pytest.approx(400 / (1 + 400 / (4 * 1999)), rel=0.01)


def test_eigen_samples_are_the_block_that_moves_most() -> None:
    losses = planted_traces(torch.arange(30) % 3, shared=0.9, num_draws=300).losses.clone()
    losses = (losses - losses.mean(dim=(0, 1))) / losses.std(dim=(0, 1))
    losses[:, :, 1::3] *= 10  # block 1
    found = spectrum(lossk.LossKernel.from_traces(lossk.LossTraces(losses)), 2)
    first = found.eigen_samples(0, 10)
    assert sorted(first.index.tolist()) == list(range(1, 30, 3))
    assert (first.entry > 0).all() or (first.entry < 0).all()
    assert first.entry.abs().diff().max() <= 0
    with pytest.raises(ValueError, match="j must be from 0 to 1, got 2"):
        found.eigen_samples(2)


def test_nothing_varies() -> None:
    found = spectrum(lossk.LossKernel.from_traces(lossk.LossTraces(torch.ones(2, 5, 9))), 3)
    assert found.participation_ratio == 0.0
    assert found.share.tolist() == [0.0, 0.0, 0.0]
