"""The factor form on disk: its numbers against float64, its memory, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

import lossk
import oracles
from lossk.kernel.trace_writer import chunk_samples
from lossk.store.stored_factor import StoredFactor

UNIT16 = 2.0**-11
SHAPES = [
    (1, 2, 1, 1),
    (2, 11, 37, 1),
    (3, 7, 37, 16),
    (4, 5, 101, 13),
    (1, 16, 97, 97),
    (2, 300, 53, 20),
]  # C, T, N, chunk


def bound(num_rows: int, dtype: str) -> float:
    """Of the error of K_ij over sqrt(K_ii K_jj): scaled entries rounded to float16 by way of float32, which has
    subnormal numbers below 2^-14 (2^-25 of a scale that is at most sqrt(2) of the deviation), and float32 products."""
    unit = UNIT16 * (1 + 2.0**-12) if dtype == "float16" else oracles.UNIT32
    return 2 * unit + unit**2 + 4 * 2.0**-25 + (num_rows + 12) * oracles.UNIT32


def make_losses(chains: int, draws: int, samples: int) -> np.ndarray:
    """Deviations over nine decades, a shared signal, shifted chains, and dead samples where there is room."""
    rng = np.random.default_rng(chains + draws + samples)
    shared = rng.standard_normal((chains, draws, 2)) @ rng.standard_normal((2, samples))
    losses = shared + rng.standard_normal((chains, draws, samples)) + rng.standard_normal((chains, 1, samples))
    losses *= 10.0 ** rng.uniform(-8, 1, samples)
    losses[:, :, 3:36:16] = 0.7
    return losses.astype(np.float32)


def save(path: Path, losses: np.ndarray, chunk: int | None, **settings: Any) -> lossk.LossKernel:
    """By appending in ragged parts."""
    chains, draws, samples = losses.shape
    shape = {"num_chains": chains, "num_draws": draws, "num_samples": samples}
    with lossk.TraceWriter(path, **shape, chunk=chunk, **settings) as writer:
        start, step = 0, 1
        while start < samples:
            writer.append(losses[:, :, start : start + step])
            start, step = start + step, 3 * step
    return lossk.open(path)


@pytest.mark.parametrize("centering", ["chain", "pooled"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape: tuple[int, int, int, int], dtype: str, centering: str, tmp_path: Path) -> None:
    """|K - truth| <= (2 u + u^2 + ...) sqrt(K_ii K_jj) by every way of reading; the diagonal is exact."""
    *_, n, chunk = shape
    losses = make_losses(*shape[:3])
    kernel = save(tmp_path / "t.lossk", losses, chunk, dtype=dtype, centering=centering)
    k, e = oracles.two_pass(losses, centering), bound(shape[0] * shape[1], dtype)
    sd = np.sqrt(np.diag(k))
    assert (kernel.dtype, kernel.tile, kernel.centering, len(kernel)) == (dtype, chunk, centering, n)
    np.testing.assert_array_equal(kernel.dead, np.diag(k) == 0)
    np.testing.assert_allclose(kernel.variance, np.diag(k), rtol=1e-12)
    np.testing.assert_allclose(kernel.mean_loss, losses.astype(np.float64).mean((0, 1)), rtol=1e-12)
    tolerance = e * np.outer(sd, sd)
    for found in (kernel.to_numpy(), kernel[:].numpy()):
        assert np.all(np.abs(found - k) <= tolerance + 1e-30)
    assert np.all(np.abs(kernel.correlation().numpy() - oracles.correlation(k)) <= e + 8 * oracles.UNIT32)
    v = np.random.default_rng(0).standard_normal((n, 2))
    assert np.all(np.abs(kernel.matvec(v).numpy() - k @ v) <= tolerance @ np.abs(v) + 1e-30)
    some = np.arange(n)[:: max(1, n // 5)]
    assert np.all(
        np.abs(kernel[some, some[::-1].copy()].numpy() - k[np.ix_(some, some[::-1])]) <= 1.01 * tolerance.max()
    )


def test_typical_error(tmp_path: Path) -> None:
    """Rounding moves a covariance by less than 2^-11 sqrt(K_ii K_jj / D), 2^-11 of its Monte Carlo error."""
    rng = np.random.default_rng(0)
    losses = (rng.standard_normal((2, 400, 1)) + rng.standard_normal((2, 400, 60))).astype(np.float32)
    kernel = save(tmp_path / "t.lossk", losses, 32)
    k = oracles.two_pass(losses)
    error = (kernel.to_numpy() - k) / np.sqrt(np.outer(np.diag(k), np.diag(k)))
    rms = np.sqrt(np.mean(error[np.triu_indices(60, 1)] ** 2))
    assert rms < UNIT16 / np.sqrt(800)
    assert rms > 0.1 * UNIT16 / np.sqrt(800), "it is float16 that is measured"


@pytest.mark.parametrize("chunk", [3, 16, 23, 101])
def test_neighbors(chunk: int, tmp_path: Path) -> None:
    """Of all rows and of some: the values of the float64 truth within the bound, dead samples nobody's."""
    losses = make_losses(4, 5, 101)
    kernel = save(tmp_path / "t.lossk", losses, chunk)
    r = oracles.correlation(oracles.two_pass(losses))
    dead = kernel.dead.numpy()
    r[:, dead] = r[dead] = -np.inf
    np.fill_diagonal(r, -np.inf)
    e = bound(20, "float16") + 8 * oracles.UNIT32
    live = np.flatnonzero(~dead)
    for rows in (None, [3, 100, 0, 50]):
        index, correlation, floor = (x.numpy() for x in kernel.neighbors(7, rows=rows))
        at = np.arange(101) if rows is None else np.array(rows)
        assert len(floor) == len(at)
        for a, sample in enumerate(at):
            if dead[sample]:
                assert np.all(index[a] == -1)
                continue
            assert set(index[a]) <= set(live) - {sample}
            assert np.all(np.abs(r[sample, index[a]] - correlation[a]) <= e)
            assert np.all(np.abs(np.sort(r[sample])[::-1][:7] - correlation[a]) <= e)


@pytest.mark.parametrize(("shape", "k"), [((2, 9, 700), 5), ((2, 9, 700), 18), ((3, 250, 90), 4), ((1, 3, 600), 3)])
def test_eigsh(shape: tuple[int, int, int], k: int, tmp_path: Path) -> None:
    """Eigenvalues within ||error||_2 <= bound trace(K); unit vectors, also past the rank; small residuals."""
    losses = make_losses(*shape)
    kernel = save(tmp_path / "t.lossk", losses, 64)
    truth = oracles.two_pass(losses)
    values, vectors = (x.numpy() for x in kernel.eigsh(k))
    error = bound(shape[0] * shape[1], "float16") * np.trace(truth)
    assert np.all(np.diff(values) <= 0)
    assert np.all(np.abs(values - np.linalg.eigvalsh(truth)[::-1][:k]) <= error)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(k), atol=1e-8)
    own = kernel.matvec(vectors).numpy()
    np.testing.assert_allclose(own, vectors * values, atol=1e-9 * values[0])


def test_eigsh_of_nothing_that_varies(tmp_path: Path) -> None:
    kernel = save(tmp_path / "t.lossk", np.ones((1, 3, 600), np.float32), 64)
    values, vectors = kernel.eigsh(2)
    assert values.tolist() == [0, 0]
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(2), atol=1e-12)


def test_many_draws_have_an_iterative_solver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kernel = save(tmp_path / "t.lossk", make_losses(2, 9, 700), 64)
    by_gram = kernel.eigsh(3)
    monkeypatch.setattr("lossk.kernel.spectrum.GRAM_DRAWS", 1)
    for mine, theirs in zip(kernel.eigsh(3), by_gram, strict=True):
        np.testing.assert_allclose(mine.abs(), theirs.abs(), atol=1e-8 * float(by_gram[0][0]))


def test_in_memory_and_on_disk_agree(tmp_path: Path) -> None:
    """float32 on disk is the factor in memory, bit for bit; so are the diagnostics, tokens and sets."""
    losses = make_losses(2, 11, 37)
    tokens = torch.stack([torch.arange(37) // 5, torch.arange(37) % 5], dim=1)
    excess = torch.linspace(0, 1, 22).reshape(2, 11)
    sets = {"a": slice(0, 20), "b": slice(20, 37)}
    traces = lossk.LossTraces(losses, tokens=tokens, sets=sets, excess=excess, n_beta=3.0, meta={"made": "here"})
    traces.save(tmp_path / "t.lossk", dtype="float32")
    mine, theirs = lossk.open(tmp_path / "t.lossk"), lossk.LossKernel.from_traces(traces)
    assert isinstance(mine.contents.blocks, StoredFactor)
    np.testing.assert_array_equal(mine[:], theirs[:])
    np.testing.assert_array_equal(mine.tokens, tokens)
    np.testing.assert_array_equal(mine.standard_error(method="chains"), theirs.standard_error(method="chains"))
    assert (mine.sets, mine.meta, mine.num_chains, mine.num_draws) == (sets, {"made": "here"}, 2, 11)
    for key, value in theirs.diagnostics.to_dict().items():
        other = mine.diagnostics.to_dict()[key]
        rel = 1e-6 if key == "noise_floor" else 1e-9  # the floor is of float32, of traces with and without their means
        assert other == (
            value if value is None or isinstance(value, str) else pytest.approx(value, rel=rel, nan_ok=True)
        )


def test_saved_again(tmp_path: Path, assert_same_kernel: Any) -> None:
    kernel = save(tmp_path / "a.lossk", make_losses(2, 11, 37), 16)
    kernel.save(tmp_path / "b.lossk")
    assert_same_kernel(lossk.open(tmp_path / "b.lossk"), kernel)
    with pytest.raises(FileExistsError, match=r"b\.lossk"):
        kernel.save(tmp_path / "b.lossk")
    kernel.save(tmp_path / "a.lossk", overwrite=True)
    assert_same_kernel(lossk.open(tmp_path / "a.lossk"), kernel)


def test_only_the_chunks_asked_for_are_read(tmp_path: Path) -> None:
    """A lost or damaged chunk is named when it is needed, and harmless before."""
    kernel = save(tmp_path / "t.lossk", make_losses(2, 11, 37), 16)
    chunks = tmp_path / "t.lossk" / "factor" / "c" / "0"
    (chunks / "1").unlink()
    content = bytearray((chunks / "2").read_bytes())
    content[40] ^= 1
    (chunks / "2").write_bytes(content)
    assert kernel[[0, 5], [15]].isfinite().all()
    with pytest.raises(lossk.StoreError, match=r"chunk 1 of the factor.*missing"):
        kernel[[0], [16]]
    with pytest.raises(lossk.StoreError, match=r"chunk 2 of the factor.*damaged"):
        kernel[[0], [36]]


def test_xarray_reads_it(tmp_path: Path) -> None:
    xarray = pytest.importorskip("xarray")
    losses = make_losses(2, 11, 37)
    save(tmp_path / "t.lossk", losses, 16)
    with xarray.open_zarr(tmp_path / "t.lossk") as found:
        assert found["factor"].dims == ("draw", "sample")
        assert found["chain_mean"].dims == ("chain", "sample")
        back = found["factor"].values.reshape(2, 11, 37) * found["scale"].values + found["chain_mean"].values[:, None]
    assert np.all(
        np.abs(back - losses) <= 2 * UNIT16 * np.abs(losses - losses.mean(1, keepdims=True)).max(axis=(0, 1)) + 1e-6
    )


def test_zarr_reads_it(tmp_path: Path) -> None:
    """float16, one chunk per 16 samples with its checksum: 4 bytes more than its numbers; nothing beside the store."""
    save(tmp_path / "t.lossk", make_losses(2, 11, 37), 16)
    group = zarr.open_group(str(tmp_path / "t.lossk"), mode="r")
    factor = group["factor"]
    assert (factor.dtype, factor.shape, factor.chunks) == (np.float16, (22, 37), (22, 16))
    files = sorted((tmp_path / "t.lossk" / "factor" / "c" / "0").iterdir())
    assert [file.stat().st_size for file in files] == [22 * 16 * 2 + 4] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["t.lossk"]


def test_losses_from_anywhere(tmp_path: Path, assert_same_kernel: Any) -> None:
    """Tensors, slices of a read-only memory map, and Zarr arrays."""
    losses = make_losses(2, 5, 37)
    whole = save(tmp_path / "a.lossk", losses, 16)
    np.save(tmp_path / "losses.npy", losses)
    mapped = np.load(tmp_path / "losses.npy", mmap_mode="r")
    array = zarr.create_array(str(tmp_path / "losses.zarr"), data=losses, chunks=(1, 5, 37))
    for number, source in enumerate((torch.from_numpy(losses), losses.astype(np.float64), mapped, array)):
        path = tmp_path / f"{number}.lossk"
        with lossk.TraceWriter(path, num_chains=2, num_draws=5, num_samples=37, chunk=16) as writer:
            writer.append(source[:, :, :20])
            writer.append(source[:, :, 20:])
        assert_same_kernel(lossk.open(path), whole)
    with pytest.raises(ValueError, match="the writer is closed"):
        writer.append(losses)


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_chains": 0}, "num_chains must be at least 1, got 0"),
        ({"num_draws": 1}, "num_draws must be at least 2, got 1"),
        ({"num_samples": 2.5}, "num_samples must be an integer, got 2.5"),
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
        ({"dtype": "int8"}, "dtype must be"),
        ({"centering": "median"}, "centering must be"),
    ],
)
def test_bad_settings(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"num_chains": 1, "num_draws": 3, "num_samples": 5, **change}
    with pytest.raises((TypeError, ValueError), match=message):
        lossk.TraceWriter(tmp_path / "t.lossk", **settings)
    assert not list(tmp_path.iterdir())


def test_bad_losses_leave_nothing(tmp_path: Path) -> None:
    shape = {"num_chains": 2, "num_draws": 3, "num_samples": 5}
    bad = np.ones((2, 3, 4))
    bad[1, 2, 3] = 1e300
    cases = [
        (np.ones((2, 4, 5)), r"shape \[2, 3, n\].*got \[2, 4, 5\]"),
        (np.ones((2, 3, 6)), "at most the 5 samples"),
        (np.ones((2, 3)), r"got \[2, 3\]"),
        (bad, "chain 1, draw 2, sample 3 is inf"),
        (np.ones((2, 3, 4)), "4 of 5 samples were appended; no store is written"),
    ]
    for losses, message in cases:
        with pytest.raises(ValueError, match=message), lossk.TraceWriter(tmp_path / "t.lossk", **shape) as writer:
            writer.append(losses)
        assert not list(tmp_path.iterdir())


def test_an_existing_path_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.lossk").write_text("precious")
    with pytest.raises(FileExistsError, match=r"t\.lossk.*exists"):
        save(tmp_path / "t.lossk", make_losses(1, 2, 3), None)
    assert (tmp_path / "t.lossk").read_text() == "precious"


def test_chunk_sizes() -> None:
    assert chunk_samples(1000, "float16") == 4096
    assert chunk_samples(10**5, "float16") == 80
    assert chunk_samples(10**8, "float32") == 16


# --- memory ------------------------------------------------------------------------------------------------------

MEASURE = """
import sys, numpy as np, torch, lossk
sys.path.insert(0, {root!r})
from bench.memory_watch import MemoryWatch
torch.set_num_threads(1)
C, T, N, chunk = 2, 100, 120_000, 512
rng = np.random.default_rng(0)
lossk.LossKernel.from_traces(lossk.LossTraces(rng.random((2, 5, 600), np.float32))).eigsh(2)  # loads the libraries
tiny = {path!r} + ".tiny"
lossk.LossTraces(rng.random((2, 5, 600), np.float32)).save(tiny)
lossk.open(tiny).neighbors(2)
watch = MemoryWatch()
with lossk.TraceWriter({path!r}, num_chains=C, num_draws=T, num_samples=N, chunk=chunk) as writer:
    for start in range(0, N, 1000):
        writer.append(rng.random((C, T, 1000), np.float32))
print(watch.bytes()["above"])
watch = MemoryWatch()
kernel = lossk.open({path!r})
kernel.matvec(np.ones(N))
kernel.eigsh(4)
kernel.neighbors(10, rows=range(0, N, 1200))
kernel[range(0, N, 1000), range(5, N, 1000)]
print(watch.bytes()["above"])
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak memory")
def test_memory_is_bounded(tmp_path: Path) -> None:
    """200 draws x 120,000 samples, 96 MB as they come and 48 MB on disk, written and read in chunks of 512 samples:
    what is kept of each sample (7 MB) and the working memory stay below 40 MB."""
    root = Path(__file__).resolve().parents[3]
    program = MEASURE.format(root=str(root), path=str(tmp_path / "t.lossk"))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    writing, reading = map(float, done.stdout.split())
    assert writing < 40e6
    assert reading < 40e6
