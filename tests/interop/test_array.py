"""A kernel as NumPy and scikit-learn read it, and what its methods say of arguments that they cannot take."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

import lossk
from lossk.analysis.baselines import Baseline

N = 24
BAD = (TypeError, ValueError, IndexError)


def losses() -> np.ndarray:
    """[2, 60, 24]: two groups of samples whose losses move together, so that all their covariances are positive."""
    rng = np.random.default_rng(3)
    groups = rng.standard_normal((2, 60, 2)).repeat(N // 2, axis=2)
    return 5.0 + groups + rng.standard_normal((2, 60, 1)) + 0.3 * rng.standard_normal((2, 60, N))


@pytest.fixture(scope="module")
def traces() -> lossk.LossTraces:
    return lossk.LossTraces(losses(), sets={"train": slice(0, 15), "query": slice(15, N)})


@pytest.fixture(scope="module")
def kernel(traces: lossk.LossTraces) -> lossk.LossKernel:
    return lossk.LossKernel.from_traces(traces)


@pytest.fixture(scope="module")
def cross(kernel: lossk.LossKernel) -> lossk.CrossKernel:
    return lossk.CrossKernel(kernel)


@pytest.fixture(scope="module")
def baseline() -> Baseline:
    return Baseline("features", torch.from_numpy(np.random.default_rng(5).standard_normal((N, 3))))


# --- NumPy -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["kernel", "cross", "baseline"])
def test_it_is_an_array(what: str, request: pytest.FixtureRequest) -> None:
    held = request.getfixturevalue(what)
    whole = held[:, :].numpy()
    array = np.asarray(held)
    np.testing.assert_allclose(array, whole, rtol=1e-6)
    assert array.dtype == np.float32
    assert held.shape == array.shape == np.shape(held)
    assert held.ndim == array.ndim == 2
    assert len(held) == len(array)
    assert np.asarray(held, dtype=np.float64).dtype == np.float64
    assert np.array(held, copy=True).flags.owndata or np.array(held).base is not None
    with pytest.raises(ValueError, match="copy must be None or True"):
        np.asarray(held, copy=False)


def test_linear_algebra_takes_it(kernel: lossk.LossKernel) -> None:
    values = np.linalg.eigvalsh(kernel)  # type: ignore[call-overload]
    np.testing.assert_allclose(values[::-1][:4], kernel.eigsh(4)[0], rtol=1e-4)
    np.testing.assert_allclose(np.trace(kernel), kernel.variance.sum(), rtol=1e-5)  # type: ignore[call-overload]


def test_it_is_too_large_in_words(
    kernel: lossk.LossKernel, cross: lossk.CrossKernel, baseline: Baseline, monkeypatch: pytest.MonkeyPatch
) -> None:
    little = psutil.virtual_memory()._replace(available=4 * 15 * 9)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: little)
    for held, size in ((kernel, "24 x 24"), (cross, "15 x 9"), (baseline, "24 x 24")):
        with pytest.raises(MemoryError, match=f"the {size} matrix needs .* GB and .* GB are available; read blocks"):
            np.asarray(held)


def test_rows_are_not_iterated_unasked(kernel: lossk.LossKernel, cross: lossk.CrossKernel) -> None:
    for held in (kernel, cross):
        with pytest.raises(TypeError, match="is not iterated row by row; read blocks"):
            next(iter(held))
        with pytest.raises(TypeError, match="read blocks"):
            list(held)
    assert kernel


# --- scikit-learn ------------------------------------------------------------------------------------------------


def test_spectral_clustering(kernel: lossk.LossKernel) -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    labels = cluster.SpectralClustering(2, affinity="precomputed", random_state=0).fit(kernel).labels_
    assert len(set(labels[: N // 2])) == len(set(labels[N // 2 :])) == 1
    assert labels[0] != labels[-1]


def test_kernel_machines(kernel: lossk.LossKernel) -> None:
    decomposition, svm = pytest.importorskip("sklearn.decomposition"), pytest.importorskip("sklearn.svm")
    found = decomposition.KernelPCA(2, kernel="precomputed").fit_transform(kernel)
    expected = decomposition.KernelPCA(2, kernel="precomputed").fit_transform(kernel.to_numpy())
    np.testing.assert_allclose(np.abs(found), np.abs(expected), rtol=1e-6)
    group = np.arange(N) // (N // 2)
    assert (svm.SVC(kernel="precomputed").fit(kernel, group).predict(kernel) == group).all()


def test_a_distance(kernel: lossk.LossKernel) -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    distance = 1.0 - kernel.to_numpy(correlation=True)
    found = cluster.AgglomerativeClustering(2, metric="precomputed", linkage="average").fit(distance).labels_
    assert len(set(found[: N // 2])) == 1
    assert found[0] != found[-1]


# --- arguments of a kernel's methods -----------------------------------------------------------------------------

WRONG: list[Any] = ["a", b"a", 1.5, 1j, True, {"a": 1}, {1}, [[1], [2, 3]], object(), np.array("a"), lambda: 1, int]
NAN = torch.full((N,), math.nan)
METHODS: list[tuple[str, Callable[[lossk.LossKernel, Any], Any], list[Any]]] = [
    ("rows", lambda k, v: k[v], [*WRONG, None, [0.5], ["a"], N, -N - 1, 10**30, [True], slice("a", 3), slice(0, 3, 0)]),
    ("columns", lambda k, v: k[0, v], [*WRONG, None, ..., torch.zeros(2, 2).long(), np.array([2**64 - 1], np.uint64)]),
    ("rows", lambda k, v: k.correlation(v), [*WRONG, None, torch.zeros(3)]),
    ("columns", lambda k, v: k.standard_error(0, v), WRONG),
    ("method", lambda k, v: k.standard_error(0, 1, method=v), [5, None, "mean", True, ["auto"], np.zeros(2)]),
    ("correlation", lambda k, v: k.standard_error(0, 1, correlation=v), [0, 1, "no", None, [True]]),
    ("correlation", lambda k, v: k.to_numpy(v), [0, "yes", None, np.zeros(2)]),
    ("k", lambda k, v: k.neighbors(v), [0, N, "3", 3.0, True, None, [3], 10**30, np.zeros(2), math.nan]),
    ("k", lambda k, v: k.eigsh(v), [0, N + 1, "3", 3.0, False, None]),
    ("anti", lambda k, v: k.neighbors(3, anti=v), [0, 1, "no", None]),
    ("backend", lambda k, v: k.neighbors(3, backend=v), [0, True, "cpp", ["torch"]]),
    ("rows", lambda k, v: k.neighbors(3, v), WRONG),
    ("v", lambda k, v: k.matvec(v), [*WRONG, None, NAN, torch.ones(N + 1), torch.ones(N, 2, 2), torch.ones(N) * 1j]),
    ("v", lambda k, v: k @ v, [np.ones(3), 2.0, np.array(["a"] * N), torch.eye(N).to_sparse()]),
    ("path", lambda k, v: k.save(v), [5, None, b"a", "", "/", ["a"], True]),
    ("path", lambda k, v: k.to_zarr(v), [5, None, "."]),
    ("path", lambda k, v: k.to_memmap(v), [5, None, "a\0b"]),
    ("overwrite", lambda k, v: k.save("a", v), [1, 0, "no", None]),
    ("path", lambda _, v: lossk.open(v), [5, None, b"a", "", {"a": 1}, object()]),
    ("traces", lambda _, v: lossk.LossKernel.from_traces(v), [None, losses(), "a", lossk.LossTraces]),
    ("centering", lambda _, v: lossk.LossKernel.from_traces(lossk.LossTraces(losses()), centering=v), [None, 1, "no"]),
    ("samples", lambda k, v: lossk.CrossKernel(k, samples=v), ["a", 5, [1, 2], range(14), [-1] * 15, [0.5] * 15, {}]),
    ("kernel", lambda _, v: lossk.CrossKernel(v), [None, np.eye(3), "a"]),
    ("train", lambda k, v: lossk.CrossKernel(k, v), [None, "tset", 1.5, [N], {"a": 1}, []]),
    ("query", lambda k, v: lossk.CrossKernel(k, query=v), [None, "tset", 1.5, [N]]),
]


@pytest.mark.parametrize(("name", "call", "values"), METHODS, ids=[name for name, _, _ in METHODS])
def test_every_refusal_names_its_argument(
    name: str, call: Any, values: list[Any], kernel: lossk.LossKernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for value in values:
        with pytest.raises(BAD) as caught:
            call(kernel, value)
        assert str(caught.value).startswith(name), f"{value!r}: {caught.value}"
        assert len(str(caught.value)) < 500
    assert not list(tmp_path.iterdir())


def test_an_index_has_two_parts_at_most(kernel: lossk.LossKernel, cross: lossk.CrossKernel) -> None:
    for held in (kernel, cross):
        with pytest.raises(IndexError, match=r"\[rows\] or \[rows, columns\], got 3 parts"):
            held[0, 1, 2]


def test_indices_of_every_right_type(kernel: lossk.LossKernel) -> None:
    whole = kernel.to_numpy()
    for index in (3, np.int64(3), np.uint8(3), torch.tensor(3), np.array(3)):
        np.testing.assert_allclose(kernel[index], whole[3:4], rtol=1e-6)
    for index in (slice(9, 3), slice(None, None, -2), np.arange(N)[::-1], np.array([1, 2], ">i4"), range(2, 5), []):
        np.testing.assert_allclose(kernel[index], whole[index], rtol=1e-6)


def test_numbers_of_numpy_are_taken(kernel: lossk.LossKernel) -> None:
    np.testing.assert_array_equal(kernel.neighbors(np.int64(3)).index, kernel.neighbors(3).index)  # type: ignore[arg-type]
    np.testing.assert_array_equal(kernel.eigsh(np.uint8(2))[0], kernel.eigsh(2)[0])  # type: ignore[arg-type]
    ones = np.broadcast_to(np.float32(1.0), (N,))  # read-only
    torch.testing.assert_close(kernel @ ones, kernel.matvec([1] * N))  # type: ignore[arg-type]


# --- traces ------------------------------------------------------------------------------------------------------

TRACES: list[tuple[str, list[Any]]] = [
    ("excess", [np.zeros((3, 60)), np.zeros(2), 0.5, "a", {}, [[1.0], [2.0, 3.0]], np.zeros((2, 60), complex)]),
    ("n_beta", [-1, 0, "1", math.nan, math.inf, True, [1.0], 10**400, torch.ones(2)]),
    ("meta", [5, [1], "a", {1: 2}]),
    ("tokens", [5, "a", np.zeros((N, 2)), np.zeros((N, 3), int), {"a": 1}, np.zeros((N, 2), bool)]),
    ("sets", [5, ["a"], {"a": 5}, {"a": slice(0, N + 1)}, {"a": slice(3, 3)}, {"a": slice(0.5, 3)}, {1: slice(0, 3)}]),
]


@pytest.mark.parametrize(("name", "values"), TRACES, ids=[name for name, _ in TRACES])
def test_what_goes_with_traces(name: str, values: list[Any], tmp_path: Path) -> None:
    sizes = {"num_chains": 2, "num_draws": 60, "num_samples": N}
    for value in values:
        for make in (
            lambda value: lossk.LossTraces(losses(), **{name: value}),
            lambda value: lossk.TraceWriter(tmp_path / "t.lossk", **sizes, **{name: value}),
        ):
            with pytest.raises(BAD) as caught:
                make(value)
            assert str(caught.value).startswith(name), f"{value!r}: {caught.value}"
    assert not list(tmp_path.iterdir())


def test_traces_of_numpy_are_saved(tmp_path: Path) -> None:
    sets = {"a": slice(np.int64(0), np.int64(5))}
    traces = lossk.LossTraces(
        losses().tolist(), n_beta=np.float32(3.0), meta={"lr": np.float32(0.5), "good": np.bool_(True)}, sets=sets,
        excess=np.ones((2, 60), np.float32),
    )  # fmt: skip
    traces.save(tmp_path / "t.lossk")
    kernel = lossk.open(tmp_path / "t.lossk")
    assert kernel.meta == {"lr": 0.5, "good": True}
    assert kernel.sets == {"a": slice(0, 5)}
    assert kernel.diagnostics is not None
    assert kernel.diagnostics.llc == pytest.approx(3.0)
