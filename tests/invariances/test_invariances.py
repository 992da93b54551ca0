"""T10: what must not change the kernel, and how what does change it does so."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lossk
import oracles
from streamed_kernels import kernel_from_panels

Build = Callable[..., lossk.LossKernel]
Same = Callable[[lossk.LossKernel, lossk.LossKernel], None]
D = 2 * 6  # draws of the `build` fixture
EVERYTHING = slice(None)


def scaled_cross_entropy(factor: float, offset: float = 0.0) -> Callable[..., Tensor]:
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        return factor * nn.functional.cross_entropy(model(inputs), targets, reduction="none") + offset

    return loss


def traces(seed: int, shape: tuple[int, int, int] = (2, 9, 23)) -> np.ndarray:
    rng = np.random.default_rng(seed)
    shared = rng.standard_normal((*shape[:2], 3)) @ rng.standard_normal((3, shape[2]))
    return (1 + 0.01 * (shared + rng.standard_normal(shape))).astype(np.float32)


def stream(losses: np.ndarray, panel: int = 4, tile: int = 16, centering: str = "chain") -> lossk.LossKernel:
    chains, draws, n = losses.shape
    starts = range(0, draws, panel)
    cut = [(c, torch.from_numpy(losses[c, t : t + panel].copy())) for c in range(chains) for t in starts]
    return kernel_from_panels(
        cut, n, num_chains=chains, num_draws=draws, tile=tile, centering=centering, dtype="float32"
    )


def factor(losses: np.ndarray) -> lossk.LossKernel:
    return lossk.LossKernel.from_traces(lossk.LossTraces(torch.from_numpy(losses)))


def standard_scale(kernel: lossk.LossKernel) -> np.ndarray:
    sd = np.sqrt(np.asarray(kernel.variance, dtype=np.float64))
    return np.outer(sd, sd)


FORMS = pytest.mark.parametrize("form", [stream, factor], ids=["tiles", "factor"])


# --- the losses change -------------------------------------------------------------------------------------------


@FORMS
@pytest.mark.parametrize("a", [4.0, 2.0**-20, -0.5])
def test_powers_of_two_scale_exactly(form: Callable[..., lossk.LossKernel], a: float) -> None:
    losses = traces(1)
    one, scaled = form(losses), form((a * losses).astype(np.float32))
    np.testing.assert_array_equal(scaled[EVERYTHING, EVERYTHING], a * a * one[EVERYTHING, EVERYTHING])
    np.testing.assert_array_equal(scaled.correlation(EVERYTHING, EVERYTHING), one.correlation(EVERYTHING, EVERYTHING))


@FORMS
def test_affine_losses(form: Callable[..., lossk.LossKernel]) -> None:
    """a l + b in float32 moves each loss by up to u |a l + b| <= 6 u: against deviations of 0.03 a, 2e-5 in K."""
    losses = traces(2)
    one, other = form(losses), form((3.0 * losses + 2.0).astype(np.float32))
    error = np.abs(other.to_numpy() - 9 * one.to_numpy()) / (9 * standard_scale(one))
    assert np.all(error < 1e-4)
    r = np.abs(other.to_numpy(correlation=True) - one.to_numpy(correlation=True))
    assert np.all(r < 1e-4)


@pytest.mark.parametrize("a", [4.0, 0.25])
def test_scaling_through_build_kernel(build: Build, problem: Any, sgld: Callable[..., lossk.SGLD], a: float) -> None:
    """Losses a l under n_beta / a: the same drift to the bit for a power of two, so the same chain and a^2 K."""
    one = build(problem.model(), problem.data, loss=scaled_cross_entropy(1.0))
    scaled = build(problem.model(), problem.data, loss=scaled_cross_entropy(a), sampler=sgld(n_beta=30.0 / a))
    np.testing.assert_array_equal(scaled.to_numpy(), a * a * one.to_numpy())
    np.testing.assert_array_equal(scaled.to_numpy(correlation=True), one.to_numpy(correlation=True))


def test_offset_through_build_kernel(build: Build, problem: Any) -> None:
    """The chain does not see b; the losses near 3 then carry a rounding of 2^-23, deviations are above 1e-2."""
    one = build(problem.model(), problem.data, loss=scaled_cross_entropy(1.0))
    other = build(problem.model(), problem.data, loss=scaled_cross_entropy(1.0, 2.0))
    assert np.sqrt(np.asarray(one.variance)).min() > 1e-2
    assert np.all(np.abs(other.to_numpy() - one.to_numpy()) < 1e-4 * standard_scale(one))
    np.testing.assert_allclose(np.asarray(other.mean_loss), np.asarray(one.mean_loss) + 2, rtol=1e-6)


# --- the order of the samples ------------------------------------------------------------------------------------


@FORMS
def test_permuted_traces(form: Callable[..., lossk.LossKernel]) -> None:
    losses = traces(3)
    order = np.random.default_rng(0).permutation(losses.shape[2])
    one, permuted = form(losses).to_numpy(), form(losses[:, :, order].copy()).to_numpy()
    scale = np.sqrt(np.outer(np.diag(one), np.diag(one)))
    error = np.abs(permuted - one[np.ix_(order, order)])
    assert np.all(error <= 2 * (18 + 12) * oracles.UNIT32 * scale[np.ix_(order, order)])


def test_permuted_probe(build: Build, problem: Any) -> None:
    """The training data stay in place, so the chain does; a row's loss may round differently at another place."""
    order = torch.randperm(problem.num_samples, generator=torch.Generator().manual_seed(1))
    inputs, targets = problem.data
    one = build(problem.model(), problem.data, train=problem.data)
    permuted = build(problem.model(), (inputs[order], targets[order]), train=problem.data)
    expected = one.to_numpy()[order][:, order]
    scale = standard_scale(one)[order][:, order]
    assert np.all(np.abs(permuted.to_numpy() - expected) < 1e-4 * scale)


# --- how the work is cut -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{"tile": 32}, {"tile": 4096}, {"panel": 1}, {"panel": 4}, {"panel": None}], ids=str)
def test_tile_and_panel_size(build: Build, problem: Any, change: dict[str, Any]) -> None:
    """The draws are the same, so two streamings of the same traces: twice the bound of test_streaming."""
    one = build(problem.model(), problem.data)
    other = build(problem.model(), problem.data, **change)
    bound = 2 * (D + 12) * oracles.UNIT32 * standard_scale(one)
    assert np.all(np.abs(other.to_numpy() - one.to_numpy()) <= bound)
    np.testing.assert_allclose(other.mean_loss, one.mean_loss, rtol=3 * oracles.UNIT32)


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_probe_batch_size(build: Build, problem: Any, batch_size: int) -> None:
    """Matrix products of other shapes may round the losses differently, by a few u; deviations exceed 1e-2."""
    one = build(problem.model(), problem.data)
    loader = DataLoader(TensorDataset(*problem.data), batch_size=batch_size)
    other = build(problem.model(), loader)
    assert np.sqrt(np.asarray(one.variance)).min() > 1e-2
    assert np.all(np.abs(other.to_numpy() - one.to_numpy()) < 1e-4 * standard_scale(one))
    np.testing.assert_allclose(other.mean_loss, one.mean_loss, rtol=1e-6)


def cpp_status() -> tuple[bool, str]:
    from lossk.ops import extension

    status = extension.status()
    return status.available, status.reason


@pytest.mark.parametrize("preconditioner", [None, "rmsprop"])
def test_backend(build: Build, problem: Any, sgld: Callable[..., lossk.SGLD], preconditioner: str | None) -> None:
    """Normals agree to 2 ulp and every update rounds a few times: after 15 contracting steps weights of order 1 differ
    by about 15 x 4 u = 4e-6 at most, against a spread of sqrt(15 lr) = 0.1: 4e-5 of a deviation, 1e-4 of K."""
    available, reason = cpp_status()
    if not available:
        pytest.skip(f"the C++ extension cannot run: {reason}")
    sampler = sgld(preconditioner=preconditioner)
    one = build(problem.model(), problem.data, backend="torch", sampler=sampler)
    other = build(problem.model(), problem.data, backend="cpp", sampler=sampler)
    assert "cpp" in str(other.meta["backend"])
    assert "torch" in str(one.meta["backend"])
    assert np.all(np.abs(other.to_numpy() - one.to_numpy()) < 1e-4 * standard_scale(one))


# --- again, and after a stop -------------------------------------------------------------------------------------


def test_seed(build: Build, problem: Any, assert_same_kernel: Same) -> None:
    model = problem.model()
    one, again, other = (build(model, problem.data, seed=s) for s in (0, 0, 1))
    assert_same_kernel(one, again)
    assert not np.allclose(one.to_numpy(), other.to_numpy(), rtol=0.01)


def test_global_generators_do_not_matter(build: Build, problem: Any, assert_same_kernel: Same) -> None:
    one = build(problem.model(), problem.data)
    torch.manual_seed(99)
    assert_same_kernel(one, build(problem.model(), problem.data))


@pytest.mark.parametrize("batch_size", [4, None])
def test_chains_differ_and_do_not_depend_on_their_number(
    problem: Any, sgld: Callable[..., lossk.SGLD], batch_size: int | None
) -> None:
    settings = {"sampler": sgld(batch_size=batch_size), "num_draws": 5, "backend": "torch", "progress": False}
    two = np.asarray(lossk.sample_losses(problem.model(), problem.data, num_chains=2, **settings).losses)
    three = np.asarray(lossk.sample_losses(problem.model(), problem.data, num_chains=3, **settings).losses)
    np.testing.assert_array_equal(three[:2], two)
    assert not np.allclose(two[0], two[1], rtol=1e-3)


@pytest.mark.parametrize("fraction", [0.2, 0.7, 0.78, 0.82, 0.99])
@pytest.mark.parametrize("batch_size", [4, None])
@pytest.mark.parametrize("preconditioner", [None, "rmsprop"])
def test_resume_is_bitwise(
    build: Build,
    problem: Any,
    sgld: Callable[..., lossk.SGLD],
    fail_at: Any,
    assert_same_kernel: Same,
    tmp_path: Path,
    fraction: float,
    batch_size: int | None,
    preconditioner: str | None,
) -> None:
    """Stopped in the pilot (the first 60 % of the calls), in the first chain, on both sides of the second's start, and
    in the last draw."""
    sampler = sgld(batch_size=batch_size, preconditioner=preconditioner)
    loss = fail_at()
    whole = build(problem.model(), problem.data, loss=loss, sampler=sampler)
    calls, loss.calls = loss.calls, 0
    loss.at = int(fraction * calls)
    store = tmp_path / "k.lossk"
    with pytest.raises(RuntimeError, match="stopped by the test"):
        build(problem.model(), problem.data, loss=loss, sampler=sampler, out=store)
    loss.at, loss.calls = None, 0
    resumed = build(problem.model(), problem.data, loss=loss, sampler=sampler, out=store, resume=True)
    assert_same_kernel(resumed, whole)
    assert_same_kernel(lossk.open(store), whole)
    if fraction > 0.8:  # the first chain was done: it is not sampled again
        assert loss.calls < 0.75 * calls


def test_resume_after_two_stops(
    build: Build, problem: Any, fail_at: Any, assert_same_kernel: Same, tmp_path: Path
) -> None:
    loss = fail_at()
    whole = build(problem.model(), problem.data, loss=loss, panel=2)
    third = loss.calls // 3
    for resume in (False, True):
        loss.at, loss.calls = third, 0
        with pytest.raises(RuntimeError, match="stopped by the test"):
            build(problem.model(), problem.data, loss=loss, panel=2, out=tmp_path / "k", resume=resume)
    loss.at = None
    resumed = build(problem.model(), problem.data, loss=loss, panel=2, out=tmp_path / "k", resume=True)
    assert_same_kernel(resumed, whole)


def test_killed_at_any_moment(
    build: Build, problem: Any, fail_at: Any, assert_same_kernel: Same, tmp_path: Path
) -> None:
    """Copies of the store as they lie on the disk in the middle of a run, with no chance to tidy up, all go on to the
    same end."""
    loss, copies = fail_at(), []
    whole = build(problem.model(), problem.data, loss=loss)
    moments = {int(f * loss.calls) for f in (0.7, 0.8, 0.9, 0.97)}  # the checks and the pilot come first
    loss.calls = 0

    def copying(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        losses = loss(model, batch)
        if loss.calls in moments and (tmp_path / "k.lossk").exists():
            copies.append(tmp_path / f"copy-{loss.calls}.lossk")
            shutil.copytree(tmp_path / "k.lossk", copies[-1])
        return losses

    assert_same_kernel(build(problem.model(), problem.data, loss=copying, out=tmp_path / "k.lossk"), whole)
    assert len(copies) >= 3
    moments.clear()
    for copy in copies:
        assert_same_kernel(build(problem.model(), problem.data, loss=copying, out=copy, resume=True), whole)


def test_out_does_not_change_the_kernel(build: Build, problem: Any, assert_same_kernel: Same, tmp_path: Path) -> None:
    in_memory = build(problem.model(), problem.data)
    assert_same_kernel(build(problem.model(), problem.data, out=tmp_path / "k.lossk"), in_memory)


# --- the shape of a kernel ---------------------------------------------------------------------------------------


def test_symmetric_and_its_diagonal_is_the_variance(build: Build, problem: Any) -> None:
    kernel = build(problem.model(), problem.data)
    k = kernel.to_numpy()
    np.testing.assert_array_equal(k, k.T)
    np.testing.assert_allclose(np.diag(k), kernel.variance, rtol=(D + 12) * oracles.UNIT32)
    r = kernel.to_numpy(correlation=True)
    np.testing.assert_allclose(np.diag(r), 1, atol=1e-6)
    assert np.all(np.abs(r) <= 1 + 1e-6)
    assert np.linalg.eigvalsh(r)[0] > -1e-4


def test_two_roads_to_one_kernel(build: Build, problem: Any, sgld: Callable[..., lossk.SGLD]) -> None:
    """build_kernel streams; sample_losses keeps the traces, from which both float64 and the factor give the same K."""
    kernel = build(problem.model(), problem.data)
    kept = lossk.sample_losses(
        problem.model(), problem.data, sampler=sgld(), num_chains=2, num_draws=6, backend="torch", progress=False
    )
    losses = np.asarray(kept.losses)
    assert losses.shape == (2, 6, problem.num_samples)
    assert losses.dtype == np.float32
    bound = (D + 12) * oracles.UNIT32 * standard_scale(kernel)
    assert np.all(np.abs(kernel.to_numpy() - oracles.two_pass(losses)) <= bound)
    assert np.all(np.abs(lossk.LossKernel.from_traces(kept).to_numpy() - oracles.two_pass(losses)) <= bound)
    np.testing.assert_allclose(kernel.mean_loss, losses.astype(np.float64).mean((0, 1)), rtol=1e-6)


def test_constant_loss(build: Build, problem: Any) -> None:
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        losses = nn.functional.cross_entropy(model(inputs), targets, reduction="none")
        return torch.where(targets == 1, 0.0 * losses + 0.3, losses)

    kernel = build(problem.model(), problem.data, loss=loss)
    dead = (problem.targets == 1).numpy()
    np.testing.assert_array_equal(np.asarray(kernel.dead), dead)
    assert not kernel.to_numpy()[dead].any()
    r = kernel.to_numpy(correlation=True)
    np.testing.assert_array_equal(r[dead], np.eye(problem.num_samples)[dead])
    assert np.isfinite(r).all()
