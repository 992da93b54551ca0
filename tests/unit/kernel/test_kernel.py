"""Reading a kernel: tiles and factor give the same numbers by every method, and these are the closed forms' numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import lossk
import oracles
from streamed_kernels import kernel_from_panels

N, CHAINS, DRAWS, TILE = 37, 2, 11, 16
DEAD = (4, 30)
EVERYTHING = slice(None)
U = (CHAINS * DRAWS + 12) * oracles.UNIT32  # see test_streaming: errors in units of sqrt(K_ii K_jj)


def make_traces() -> np.ndarray:
    rng = np.random.default_rng(0)
    shared = rng.standard_normal((CHAINS, DRAWS, 4)) @ rng.standard_normal((4, N))
    x = 2 + 0.05 * (shared + rng.standard_normal((CHAINS, DRAWS, N)) + rng.standard_normal((CHAINS, 1, N)))
    x[:, :, DEAD] = [0.7, 0.0]
    return x.astype(np.float32)


LOSSES = make_traces()


def make(form: str, centering: str = "chain") -> lossk.LossKernel:
    if form == "factor":
        return lossk.LossKernel.from_traces(lossk.LossTraces(torch.from_numpy(LOSSES)), centering=centering)
    panels = [(c, torch.from_numpy(LOSSES[c, t : t + 4].copy())) for c in range(CHAINS) for t in range(0, DRAWS, 4)]
    return kernel_from_panels(
        panels, N, num_chains=CHAINS, num_draws=DRAWS, tile=TILE, centering=centering, dtype="float32"
    )


@pytest.fixture(params=["tiles", "factor"])
def kernel(request: pytest.FixtureRequest) -> lossk.LossKernel:
    return make(request.param)


K = oracles.two_pass(LOSSES)
R = oracles.correlation(K)
SD = np.sqrt(np.diag(K))
TOLERANCE = U * np.outer(SD, SD)


# --- T1 and T4: the estimator ------------------------------------------------------------------------------------


def test_exact_gaussian_draws() -> None:
    """T1: 60 kernels of 2 x 400 exact draws of w ~ N(mu, S) for general quadratic losses. Every entry is within 4.5 of
    its own standard errors, rms z near 1; without the trace term, or with S off by 5 %, it is not."""
    rng = np.random.default_rng(1)
    d, n, replicates = 5, 9, 60
    g, h = rng.standard_normal((n, d)), rng.standard_normal((n, d, d))
    h = (h + np.swapaxes(h, 1, 2)) / 2
    root = 0.3 * rng.standard_normal((d, d))
    s = root @ root.T + 0.05 * np.eye(d)
    target = oracles.quadratic_covariance(g, h, s)
    chol = np.linalg.cholesky(s)
    estimates = []
    for _ in range(replicates):
        u = rng.standard_normal((2, 400, d)) @ chol.T
        losses = 3 + u @ g.T + 0.5 * np.einsum("ctp,ipq,ctq->cti", u, h, u)
        kernel = lossk.LossKernel.from_traces(lossk.LossTraces(losses.astype(np.float32)))
        estimates.append(kernel.to_numpy().astype(np.float64))
    stacked = np.stack(estimates)
    z = oracles.z_scores(stacked, target)
    assert np.all(np.abs(z) < 4.5), f"max |z| = {np.max(np.abs(z)):.2f}"
    assert 0.6 < np.sqrt(np.mean(z**2)) < 1.4, f"rms z = {np.sqrt(np.mean(z**2)):.2f}"
    # Within the replicates themselves the spread must be that of 800 draws: K_ii K_jj + K_ij^2 over 799 at the least.
    upper = np.triu_indices(n)
    gaussian = (np.outer(np.diag(target), np.diag(target)) + target**2)[upper] / 799
    assert 0.6 < np.median(stacked.var(axis=0, ddof=1)[upper] / gaussian) < 4
    assert not oracles.consistent(oracles.z_scores(stacked, g @ s @ g.T))
    assert not oracles.consistent(oracles.z_scores(stacked, oracles.quadratic_covariance(g, h, 1.05 * s)))


def test_chain_centering_of_autocorrelated_traces() -> None:
    """T4: rho = 0.9, T = 50 leaves 0.706 of the variance; the mean over 3,000 traces knows it to 0.5 %."""
    rho, draws = 0.9, 50
    traces = oracles.ar1_traces(np.random.default_rng(2), (1, draws, 3000), rho)
    kernel = lossk.LossKernel.from_traces(lossk.LossTraces(traces.astype(np.float32)))
    variance = np.asarray(kernel.variance, dtype=np.float64)
    error = variance.std(ddof=1) / np.sqrt(len(variance))
    assert error < 0.01
    assert abs(variance.mean() - oracles.ar1_centering_factor(rho, draws)) < 4.5 * error
    assert abs(variance.mean() - 1) > 10 * error


def shifted() -> tuple[np.ndarray, np.ndarray]:
    """The same fluctuations without and with chain means that differ; all exact in float32."""
    rng = np.random.default_rng(3)
    base = np.round(256 * rng.standard_normal((3, 16, 20))) / 256
    base -= np.round(256 * base.mean(axis=1, keepdims=True)) / 256
    shift = np.round(rng.standard_normal((3, 1, 20)) * 4)
    return base.astype(np.float32), (base + shift).astype(np.float32)


@pytest.mark.parametrize("form", ["tiles", "factor"])
def test_shifted_chains(form: str) -> None:
    """Chain centering gains nothing from shifts; pooled gains exactly the between term, T sum_c (m_c - m)(m_c - m)'."""

    def kernel(losses: np.ndarray, centering: str) -> np.ndarray:
        if form == "factor":
            return lossk.LossKernel.from_traces(lossk.LossTraces(losses), centering=centering).to_numpy()
        panels = [(c, torch.from_numpy(losses[c].copy())) for c in range(3)]
        return kernel_from_panels(
            panels, 20, num_chains=3, num_draws=16, tile=16, centering=centering, dtype="float32"
        ).to_numpy()

    base, moved = shifted()
    within = kernel(base, "chain")
    scale = np.sqrt(np.outer(np.diag(within), np.diag(within)))
    assert np.all(np.abs(kernel(moved, "chain") - within) <= 2 * (48 + 12) * oracles.UNIT32 * scale)
    means = moved.astype(np.float64).mean(axis=1)
    between = 16 * (means - means.mean(axis=0)).T @ (means - means.mean(axis=0))
    pooled = kernel(moved, "pooled").astype(np.float64)
    scale = np.sqrt(np.outer(np.diag(pooled), np.diag(pooled)))
    gained = pooled * 47 - kernel(moved, "chain").astype(np.float64) * 45
    assert np.all(np.abs(gained - between) <= 47 * 2 * (48 + 12) * oracles.UNIT32 * scale)


# --- what a kernel says about itself -----------------------------------------------------------------------------


def test_attributes(kernel: lossk.LossKernel) -> None:
    assert kernel.num_samples == N
    assert kernel.dtype == "float32"
    assert kernel.tile % 16 == 0
    np.testing.assert_allclose(kernel.variance, np.diag(K), rtol=U)
    np.testing.assert_allclose(kernel.mean_loss, LOSSES.astype(np.float64).mean((0, 1)), rtol=1e-6)
    dead = np.asarray(kernel.dead)
    assert dead.dtype == np.bool_
    assert np.flatnonzero(dead).tolist() == list(DEAD)
    assert isinstance(kernel.meta, dict)
    assert repr(kernel)
    assert str(N) in repr(kernel)


def test_forms_agree_on_attributes() -> None:
    tiles, factor = make("tiles"), make("factor")
    assert tiles.num_draws == factor.num_draws
    assert tiles.num_samples == factor.num_samples


# --- blocks ------------------------------------------------------------------------------------------------------

mask = np.zeros(N, dtype=bool)
mask[[0, 4, 17, 36]] = True
INDICES: dict[str, tuple[Any, np.ndarray]] = {
    "list": ([3, 16, 15, 32, 4], np.array([3, 16, 15, 32, 4])),
    "repeated": ([20, 20, 1], np.array([20, 20, 1])),
    "negative": ([-1, -N, 5], np.array([N - 1, 0, 5])),
    "one": ([9], np.array([9])),
    "none": ([], np.array([], dtype=int)),
    "slice": (slice(10, 35), np.arange(10, 35)),
    "strided": (slice(None, None, 5), np.arange(0, N, 5)),
    "backwards": (slice(None, None, -1), np.arange(N)[::-1]),
    "beyond": (slice(30, 1000), np.arange(30, N)),
    "negative slice": (slice(-6, -1), np.arange(N)[-6:-1]),
    "everything": (slice(None), np.arange(N)),
    "tensor": (torch.tensor([33, 2, 18]), np.array([33, 2, 18])),
    "int32 tensor": (torch.tensor([33, 2], dtype=torch.int32), np.array([33, 2])),
    "array": (np.array([33, -2]), np.array([33, N - 2])),
    "range": (range(5, 25), np.arange(5, 25)),
    "mask": (torch.from_numpy(mask), np.flatnonzero(mask)),
    "numpy mask": (mask, np.flatnonzero(mask)),
    "list mask": (mask.tolist(), np.flatnonzero(mask)),
}


@pytest.mark.parametrize("columns", ["list", "everything", "mask", "none"])
@pytest.mark.parametrize("rows", list(INDICES))
def test_blocks(kernel: lossk.LossKernel, rows: str, columns: str) -> None:
    (i, ii), (j, jj) = INDICES[rows], INDICES[columns]
    for (a, aa), (b, bb) in [((i, ii), (j, jj)), ((j, jj), (i, ii))]:
        block, r = kernel[a, b], kernel.correlation(a, b)
        assert isinstance(block, torch.Tensor)
        assert block.dtype == r.dtype == torch.float32
        assert block.shape == r.shape == (len(aa), len(bb))
        assert np.all(np.abs(block.double().numpy() - K[np.ix_(aa, bb)]) <= TOLERANCE[np.ix_(aa, bb)])
        assert np.all(np.abs(r.double().numpy() - R[np.ix_(aa, bb)]) <= 2 * U)


def test_a_block_is_a_copy(kernel: lossk.LossKernel) -> None:
    before = kernel.to_numpy()
    kernel[EVERYTHING, EVERYTHING].fill_(7)
    kernel.correlation(EVERYTHING, EVERYTHING).fill_(7)
    np.testing.assert_array_equal(kernel.to_numpy(), before)


@pytest.mark.parametrize(
    "bad", [[N], [-N - 1], [0.5], ["a"], torch.zeros(N - 1, dtype=torch.bool), torch.zeros(2, 2).long()], ids=str
)
def test_bad_indices(kernel: lossk.LossKernel, bad: Any) -> None:
    for read in (lambda: kernel[bad, [0]], lambda: kernel[[0], bad], lambda: kernel.correlation(bad, [0])):
        with pytest.raises((IndexError, ValueError, TypeError), match=r"\S"):
            read()


def test_one_index_is_whole_rows_and_three_are_an_error(kernel: lossk.LossKernel) -> None:
    for rows in ([0, 1, 20], slice(3, 9), torch.from_numpy(mask)):
        np.testing.assert_array_equal(kernel[rows], kernel[rows, EVERYTHING])
    with pytest.raises((IndexError, ValueError, TypeError)):
        kernel[[0], [0], [0]]


# --- the whole ---------------------------------------------------------------------------------------------------


def test_to_numpy(kernel: lossk.LossKernel) -> None:
    k, r = kernel.to_numpy(), kernel.to_numpy(correlation=True)
    assert isinstance(k, np.ndarray)
    assert k.dtype == r.dtype == np.float32
    assert np.all(np.abs(k - K) <= TOLERANCE)
    assert np.all(np.abs(r - R) <= 2 * U)
    np.testing.assert_array_equal(k, k.T)
    np.testing.assert_array_equal(np.diag(r)[list(DEAD)], 1)


def test_too_large_for_numpy(kernel: lossk.LossKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with 1 KB to spare the 5,476 bytes are refused, with the size."""
    import psutil

    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=1024, free=1024, total=2048))
    with pytest.raises((MemoryError, ValueError), match=r"\d"):
        kernel.to_numpy()


def test_tiles(kernel: lossk.LossKernel) -> None:
    """(i, j, tile) once for every tile of the upper triangle; together they are the kernel."""
    whole = np.full((N, N), np.nan)
    seen = []
    for i, j, tile in kernel.tiles():
        assert i <= j
        rows, columns = slice(i * kernel.tile, (i + 1) * kernel.tile), slice(j * kernel.tile, (j + 1) * kernel.tile)
        assert whole[rows, columns].shape == tuple(tile.shape)
        whole[rows, columns] = tile.numpy()
        whole[columns, rows] = tile.numpy().T
        seen.append((i, j))
    side = -(-N // kernel.tile)
    assert sorted(seen) == [(i, j) for i in range(side) for j in range(i, side)]
    assert np.all(np.abs(whole - K) <= TOLERANCE)


# --- linear algebra ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(N,), (N, 1), (N, 6)])
def test_matvec(kernel: lossk.LossKernel, shape: tuple[int, ...]) -> None:
    """|error| <= sum_j (U sd_i sd_j + N u |K_ij|) |v_j|: the kernel's own error and that of N float32 products."""
    v = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for result in (kernel.matvec(v), kernel @ v):
        assert result.shape == v.shape
        assert result.is_floating_point()
        bound = (TOLERANCE + 2 * (N + CHAINS * DRAWS) * oracles.UNIT32 * np.outer(SD, SD)) @ np.abs(v.numpy())
        assert np.all(np.abs(result.double().numpy() - K @ v.double().numpy()) <= bound)


def test_matvec_of_the_wrong_length(kernel: lossk.LossKernel) -> None:
    for bad in (torch.zeros(()), torch.zeros(N - 1), torch.zeros(N + 1, 2), torch.zeros(2, N)):
        with pytest.raises((ValueError, TypeError), match=str(N)):
            kernel.matvec(bad)


@pytest.mark.parametrize("k", [1, 5])
def test_eigsh(kernel: lossk.LossKernel, k: int) -> None:
    """The k largest, in descending order, unit vectors, small residuals."""
    values, vectors = kernel.eigsh(k)
    values, vectors = np.asarray(values, dtype=np.float64), np.asarray(vectors, dtype=np.float64)
    exact = np.linalg.eigvalsh(K)[::-1][:k]
    assert values.shape == (k,)
    assert vectors.shape == (N, k)
    np.testing.assert_allclose(values, exact, rtol=1e-4)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(k), atol=1e-4)
    assert np.all(np.linalg.norm(K @ vectors - vectors * values, axis=0) <= 1e-4 * exact[0])


def test_eigsh_of_many_samples() -> None:
    """N = 700, too many for a dense solver to be the obvious choice; rank 18, eigenvalues over three decades."""
    rng = np.random.default_rng(7)
    directions = np.linalg.qr(rng.standard_normal((700, 18)))[0] * np.geomspace(1, 0.03, 18)
    losses = (1 + rng.standard_normal((2, 10, 18)) @ directions.T).astype(np.float32)
    kernel = lossk.LossKernel.from_traces(lossk.LossTraces(losses))
    values, vectors = (np.asarray(v, dtype=np.float64) for v in kernel.eigsh(4))
    exact = np.linalg.eigvalsh(oracles.two_pass(losses))[::-1]
    np.testing.assert_allclose(values, exact[:4], rtol=1e-4)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(4), atol=1e-6)


@pytest.mark.parametrize("k", [0, -1, N + 1])
def test_eigsh_of_too_many(kernel: lossk.LossKernel, k: int) -> None:
    with pytest.raises(ValueError, match=rf"k\b.*{k}"):
        kernel.eigsh(k)


# --- neighbors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 10, N - 1])
def test_neighbors(kernel: lossk.LossKernel, k: int) -> None:
    """The k largest correlations of every row, without the sample itself, descending."""
    result = kernel.neighbors(k)
    index, r = np.asarray(result.index), np.asarray(result.correlation, dtype=np.float64)
    assert index.shape == r.shape == (N, k)
    assert index.dtype == np.int64
    assert np.asarray(result.noise_floor).shape == (N,)
    live = [i for i in range(N) if i not in DEAD]
    for i in live:
        found = index[i][index[i] >= 0]
        assert i not in found
        assert len(set(found)) == len(found)
        assert not set(found) & set(DEAD) or k > N - 1 - len(DEAD) or np.min(R[i, found]) >= 0
        assert np.all(np.abs(r[i][index[i] >= 0] - R[i, found]) <= 2 * U)
        others = np.sort(np.delete(R[i], [i, *DEAD]))[::-1]
        expected = min(k, len(others))
        alive = [v for v, j in zip(r[i], index[i], strict=True) if j >= 0 and j not in DEAD]
        assert np.all(np.diff(alive) <= 0)
        np.testing.assert_allclose(alive[: min(expected, len(alive))], others[: min(expected, len(alive))], atol=2 * U)
        assert len(alive) >= expected - len(DEAD)
    assert np.isfinite(np.asarray(result.noise_floor)[live]).all()


def test_neighbors_of_dead_samples(kernel: lossk.LossKernel) -> None:
    """They have none, and are nobody's: -1 where a live sample runs out of live ones; correlation 0 there."""
    result = kernel.neighbors(N - 1)
    index, r = np.asarray(result.index), np.asarray(result.correlation)
    assert np.all(index[list(DEAD)] == -1)
    assert not np.isin(index, DEAD).any()
    live = np.delete(index, DEAD, axis=0)
    assert np.all((live == -1).sum(axis=1) == len(DEAD))
    assert np.all(live[:, -len(DEAD) :] == -1)
    np.testing.assert_array_equal(r[index == -1], 0)


@pytest.mark.parametrize("rows", ["list", "repeated", "negative", "none", "strided", "everything", "mask"])
def test_neighbors_of_some_rows(kernel: lossk.LossKernel, rows: str) -> None:
    """They are those that `neighbors` finds for these rows; dead ones among them have none."""
    wanted, index = INDICES[rows]
    whole, some = kernel.neighbors(5), kernel.neighbors(5, rows=wanted)
    assert some.index.shape == some.correlation.shape == (len(index), 5)
    np.testing.assert_allclose(some.correlation, whole.correlation[index], rtol=0, atol=2 * U)
    np.testing.assert_array_equal(some.noise_floor, whole.noise_floor[index])
    clear = np.abs(np.diff(whole.correlation.numpy(), axis=1)).min(axis=1)[index] > 4 * U  # no ties to be rounded apart
    np.testing.assert_array_equal(some.index[clear], whole.index[index][clear])
    assert np.all(some.index.numpy()[np.isin(index, DEAD)] == -1)


def test_neighbors_of_rows_in_groups(kernel: lossk.LossKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = kernel.neighbors(3, rows=EVERYTHING)
    for name, value in (("GROUP", 5), ("BAND", 2)):
        monkeypatch.setattr(f"lossk.kernel.neighbors.{name}", value)
    for mine, theirs in zip(kernel.neighbors(3, rows=EVERYTHING), whole, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=2 * U)


@pytest.mark.parametrize("k", [0, -2, 1.5, N])
def test_bad_number_of_neighbors(kernel: lossk.LossKernel, k: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=rf"k\b.*{k}"):
        kernel.neighbors(k)


# --- traces ------------------------------------------------------------------------------------------------------


def test_traces_from_anywhere() -> None:
    forms = [LOSSES, LOSSES.astype(np.float64), torch.from_numpy(LOSSES), torch.from_numpy(LOSSES).double()]
    reference = make("factor").to_numpy()
    for losses in forms:
        kernel = lossk.LossKernel.from_traces(lossk.LossTraces(losses))
        np.testing.assert_array_equal(kernel.to_numpy(), reference)
    assert lossk.LossTraces(LOSSES).losses.shape == LOSSES.shape


def test_traces_are_not_changed() -> None:
    losses = LOSSES.copy()
    lossk.LossKernel.from_traces(lossk.LossTraces(losses)).to_numpy()
    np.testing.assert_array_equal(losses, LOSSES)
