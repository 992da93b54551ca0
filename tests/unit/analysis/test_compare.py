"""Comparison of two kernels against dense formulas, in blocks of every form."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import lossk
from lossk.analysis import compare_kernels
from planted import planted_kernel, planted_traces

LABELS = torch.arange(61) % 3


def dense_cka(x: np.ndarray, y: np.ndarray) -> float:
    h = np.eye(len(x)) - 1 / len(x)
    hsic = lambda a, b: np.trace(a @ h @ b @ h)  # noqa: E731
    return float(hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y)))


def dense_debiased(x: np.ndarray, y: np.ndarray) -> float:
    n = len(x)

    def hsic(a: np.ndarray, b: np.ndarray) -> float:  # Song et al. 2012, equation 4, without the factor 1/(n(n-3))
        a, b = (m - np.diag(np.diag(m)) for m in (a, b))
        one = np.ones(n)
        return np.trace(a @ b) + one @ a @ one * (one @ b @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * one @ a @ b @ one

    return float(hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y)))


def test_against_dense() -> None:
    traces = planted_traces(LABELS, dead=2)
    other = planted_traces(LABELS, seed=1)
    a, b = lossk.LossKernel.from_traces(traces), lossk.LossKernel.from_traces(other)
    found = compare_kernels(a, b, k=5)
    live = ~(a.dead | b.dead).numpy()
    assert found.num_samples == 59
    upper = np.triu_indices(59, 1)
    for kind, entry, cka, debiased in (
        (False, found.entry_correlation_k, found.cka_k, found.debiased_cka_k),
        (True, found.entry_correlation_r, found.cka_r, found.debiased_cka_r),
    ):
        x, y = (kernel.to_numpy(correlation=kind).astype(np.float64)[np.ix_(live, live)] for kernel in (a, b))
        assert entry == pytest.approx(np.corrcoef(x[upper], y[upper])[0, 1], rel=1e-4, abs=1e-5)
        assert cka == pytest.approx(dense_cka(x, y), rel=1e-4)
        assert debiased == pytest.approx(dense_debiased(x, y), rel=1e-3, abs=1e-5)


def test_neighbors_gained_and_lost() -> None:
    a, b = planted_kernel(LABELS), planted_kernel(LABELS, seed=1)
    found = compare_kernels(a, b, k=5)
    near_a, near_b = a.neighbors(5).index, b.neighbors(5).index
    for i in range(61):
        of_a, of_b = set(near_a[i].tolist()), set(near_b[i].tolist())
        assert set(found.gained[i].tolist()) - {-1} == of_b - of_a
        assert set(found.lost[i].tolist()) - {-1} == of_a - of_b
        assert found.overlaps[i] == pytest.approx(len(of_a & of_b) / 5)
    assert found.overlap == pytest.approx(float(found.overlaps.mean()))
    assert found.chance_overlap == pytest.approx(5 / 60)
    lost = found.lost[0]
    assert (lost[int((lost >= 0).sum()) :] == -1).all()


def test_a_kernel_is_like_itself_in_any_form() -> None:
    kernel = planted_kernel(LABELS, dead=1)
    for other in (kernel, torch.from_numpy(kernel.to_numpy()), kernel.to_numpy()):
        found = compare_kernels(kernel, other, k=3)
        values = found.to_dict()
        for name in ("entry_correlation_k", "entry_correlation_r", "cka_k", "cka_r", "debiased_cka_k", "overlap"):
            assert values[name] == pytest.approx(1.0, abs=1e-5), name
        assert (found.gained == -1).all()


def test_ragged_tiles_and_arrays_agree(problem, build) -> None:
    tiled = build(problem.model(), problem.data, tile=16)  # 21 samples
    dense = tiled.to_numpy()
    features = torch.randn(21, 5, generator=torch.Generator().manual_seed(0))
    one, two = compare_kernels(tiled, features, k=3), compare_kernels(dense, features @ features.T, k=3)
    for name, value in one.to_dict().items():
        assert two.to_dict()[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_unrelated_kernels_are_unlike() -> None:
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(300, 40, generator=generator, dtype=torch.float64) for _ in range(2))
    found = compare_kernels(a, b)
    assert found.cka_r > 0.05  # what the diagonals alone give
    assert abs(found.debiased_cka_r) < 0.05
    assert found.overlap == pytest.approx(found.chance_overlap, abs=0.02)


def test_bad_arguments() -> None:
    kernel = planted_kernel(LABELS)
    with pytest.raises(ValueError, match="must be of the same samples, got 61 and 9"):
        compare_kernels(kernel, planted_kernel(torch.arange(9) % 2))
    with pytest.raises(ValueError, match=r"b is \[N, N\] and must be symmetric"):
        compare_kernels(kernel, np.triu(np.ones((61, 61))))
    with pytest.raises(ValueError, match="b must be finite"):
        compare_kernels(kernel, np.full((61, 4), np.nan))
    with pytest.raises(ValueError, match="k \\+ 1 = 62 samples live in both, got 61"):
        compare_kernels(kernel, kernel, k=61)
    with pytest.raises(TypeError, match="a must be a LossKernel"):
        compare_kernels("kernel", kernel)  # type: ignore[arg-type]
