"""Philox words and normals: published vectors, C++ against the reference at every SIMD level, and statistics."""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np
import numpy.typing as npt
import pytest
import torch

from lossk.ops import extension, philox

LEVELS = ("avx512", "avx2", "baseline")
SIZES = (0, 1, 2, 3, 4, 5, 7, 63, 64, 65, 1021, 200_003)
ALL_ONES = 0xFFFFFFFF

# Known answers published with Random123 (D. E. Shaw Research) for philox4x32, 10 rounds: counter, key, words.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ALL_ONES,) * 4, (ALL_ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.fixture(scope="module")
def module() -> ModuleType:
    if not extension.status().available:
        pytest.skip(extension.status().reason)
    return extension.load()


@pytest.fixture(params=LEVELS)
def simd(request: pytest.FixtureRequest, module: ModuleType) -> str:
    if module.simd(request.param) != request.param:
        pytest.skip(f"this CPU has no {request.param}")
    return request.param


def fill_words(module: ModuleType, count: int, **options: int | str) -> npt.NDArray[np.uint32]:
    out = np.zeros(count + 1, dtype=np.uint32)
    out[count] = 0xABCD
    module.philox_fill(out=out.ctypes.data, count=count, **options)
    assert out[count] == 0xABCD, "wrote past the end"
    return out[:count]


def fill_normals(module: ModuleType, count: int, **options: int | str) -> npt.NDArray[np.float32]:
    out = np.full(count + 1, np.nan, dtype=np.float32)
    module.normals(out=out.ctypes.data, count=count, **options)
    assert np.isnan(out[count]), "wrote past the end"
    return out[:count]


def ulps_apart(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> int:
    """Largest number of float32 steps between a and b; -0 equals 0."""
    assert np.isfinite(a).all()
    assert np.isfinite(b).all()
    rank = [
        np.where(x.view(np.int32) < 0, -(x.view(np.int32) & 0x7FFFFFFF).astype(np.int64), x.view(np.int32))
        for x in (a, b)
    ]
    return int(np.abs(rank[0] - rank[1]).max())


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_reference_known_answers(counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]) -> None:
    assert philox.philox4x32(np.array([counter], dtype=np.uint32), key).tolist() == [list(words)]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_cpp_known_answers(
    module: ModuleType, simd: str, counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    low = counter[0] % 16  # a fill starts at a multiple of 16 blocks
    got = fill_words(
        module,
        4 * low + 4,
        seed=key[0],
        chain=key[1],
        step=counter[2],
        stream=counter[3],
        first_block=(counter[1] << 32) + counter[0] - low,
        simd=simd,
    )
    assert got[-4:].tolist() == list(words)


def test_stream_layout() -> None:
    words = philox.uint32_stream(11, 12, 13, 2, 10)
    counter = np.array([[b, 0, 13, 2] for b in range(3)], dtype=np.uint32)
    assert words.tolist() == philox.philox4x32(counter, (11, 12)).reshape(-1)[:10].tolist()


@pytest.mark.parametrize("count", SIZES)
def test_cpp_words_equal_reference(module: ModuleType, simd: str, count: int) -> None:
    for seed, chain, step, stream in ((0, 0, 0, 0), (ALL_ONES, 5, ALL_ONES, 1), (42, ALL_ONES, 9, ALL_ONES)):
        got = fill_words(module, count, seed=seed, chain=chain, step=step, stream=stream, simd=simd)
        assert np.array_equal(got, philox.uint32_stream(seed, chain, step, stream, count))


def test_cpp_words_across_the_block_carry(module: ModuleType, simd: str) -> None:
    first = 3 * 2**32 - 32
    got = fill_words(module, 4 * 64, seed=1, chain=2, step=3, stream=0, first_block=first, simd=simd)
    blocks = np.arange(first, first + 64, dtype=np.uint64)
    counter = np.stack([blocks & 0xFFFFFFFF, blocks >> 32, np.full(64, 3), np.zeros(64)], axis=1).astype(np.uint32)
    assert np.array_equal(got, philox.philox4x32(counter, (1, 2)).reshape(-1))


@pytest.mark.parametrize("count", SIZES)
def test_cpp_normals_within_two_ulp(module: ModuleType, simd: str, count: int) -> None:
    got = fill_normals(module, count, seed=3, chain=1, step=77, simd=simd)
    assert ulps_apart(np.append(got, np.float32(1)), np.append(philox.normals(3, 1, 77, count), np.float32(1))) <= 2


def test_cpp_normals_within_two_ulp_over_millions(module: ModuleType, simd: str) -> None:
    count = 2_200_000
    got = fill_normals(module, count, seed=2026, chain=0, step=5, simd=simd)
    assert ulps_apart(got, philox.normals(2026, 0, 5, count).numpy()) <= 2


def edge_words() -> npt.NDArray[np.uint32]:
    """[n, 4]: every pair of words at the ends of the range, the quadrant edges and axes, powers of two and between."""
    centers = [0, 2**29, 2**30, 3 * 2**29, 2**31, 5 * 2**29, 3 * 2**30, 7 * 2**29, *(2**k for k in range(32))]
    # u = sqrt(1/2) 2^e is where the logarithm's reduction changes exponent.
    centers += [int(math.sqrt(0.5) * 2**k) for k in range(8, 33)]
    offsets = (-129, -128, -3, -2, -1, 0, 1, 2, 3, 127, 128, 129)
    values = np.array(sorted({(c + d) % 2**32 for c in centers for d in offsets}), dtype=np.uint32)
    x, y = (grid.reshape(-1) for grid in np.meshgrid(values, values))
    words = np.stack([x, y, y, x], axis=1)
    return np.concatenate([words, words[: -len(words) % 16]])  # whole groups of 16 counters


def test_cpp_normals_of_edge_words(module: ModuleType, simd: str) -> None:
    words = edge_words()
    got = np.full(words.shape, np.nan, dtype=np.float32)
    module.box_muller(words=words.ctypes.data, out=got.ctypes.data, count=words.size, simd=simd)
    expected = philox.box_muller(words)
    assert ulps_apart(got, expected) <= 2
    assert np.abs(got).max() < 6.8  # sqrt(2 * 33 ln 2) = 6.76
    assert (got[words[:, 0] == ALL_ONES][:, :2] == 0).all()  # u = 1


def test_cpp_avx2_equals_avx512(module: ModuleType) -> None:
    if module.simd("avx512") != "avx512":
        pytest.skip("this CPU has no avx512")
    words = edge_words()
    wide, narrow = np.empty(words.shape, dtype=np.float32), np.zeros(words.shape, dtype=np.float32)
    module.box_muller(words=words.ctypes.data, out=wide.ctypes.data, count=words.size, simd="avx512")
    module.box_muller(words=words.ctypes.data, out=narrow.ctypes.data, count=words.size, simd="avx2")
    assert wide.tobytes() == narrow.tobytes()


@pytest.mark.parametrize("count", [200_003, 4096 * 32, 4096 * 32 - 1, 4096 * 50 + 1])
def test_cpp_same_for_every_thread_count(module: ModuleType, simd: str, count: int) -> None:
    options = {"seed": 8, "chain": 9, "step": 10, "simd": simd}
    alone = [fill_words(module, count, **options).tobytes(), fill_normals(module, count, **options).tobytes()]
    for threads in (2, 3, 7, 64):
        options["num_threads"] = threads
        assert fill_words(module, count, **options).tobytes() == alone[0]
        assert fill_normals(module, count, **options).tobytes() == alone[1]


def test_bad_arguments(module: ModuleType) -> None:
    out = np.zeros(64, dtype=np.float32)
    good: dict[str, int | str] = {"out": out.ctypes.data, "count": 64, "seed": 0, "chain": 0, "step": 0}
    for change, message in (
        ({"out": 0}, "out must not be a null pointer"),
        ({"out": out.ctypes.data + 1}, "out must be aligned"),
        ({"count": -1}, "count must be >= 0, got -1"),
        ({"num_threads": 0}, "num_threads must be >= 1, got 0"),
        ({"first_block": 8}, "first_block must be a multiple of 16, got 8"),
        ({"simd": "sse9"}, "simd must be .* got sse9"),
    ):
        for fill in (module.normals, module.philox_fill):
            with pytest.raises(ValueError, match=message):
                fill(**(good | change))
    with pytest.raises(TypeError):
        module.normals(**(good | {"seed": 2**32}))
    with pytest.raises(ValueError, match="multiple of 64"):
        module.box_muller(words=out.ctypes.data, out=out.ctypes.data, count=63)
    assert not out.any()
    with pytest.raises(ValueError, match="counter must be uint32"):
        philox.philox4x32(np.zeros((1, 4), dtype=np.int64), (0, 0))
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match=r"seed must be in \[0, 2\^32\), got"):
            philox.normals(seed, 0, 0, 4)
    with pytest.raises(TypeError, match="step must be an int, got float"):
        philox.uint32_stream(0, 0, 0.5, 0, 4)  # type: ignore[arg-type]


# Statistics. Seeds are fixed, so nothing here is random; 4.5 standard errors hide no real defect at these sizes.


@pytest.fixture(scope="module")
def noise(module: ModuleType) -> npt.NDArray[np.float64]:
    return fill_normals(module, 1 << 23, seed=7, chain=0, step=0).astype(np.float64)


def test_moments(noise: npt.NDArray[np.float64]) -> None:
    n = noise.size
    squared = noise * noise
    for value, expected, variance in (
        (noise.mean(), 0.0, 1.0),
        (squared.mean(), 1.0, 2.0),
        ((squared * noise).mean(), 0.0, 15.0),
        ((squared * squared).mean(), 3.0, 96.0),
    ):
        assert abs(value - expected) < 4.5 * math.sqrt(variance / n)


@pytest.mark.parametrize("lane", range(4))
def test_lane_moments(noise: npt.NDArray[np.float64], lane: int) -> None:
    part = noise[lane::4]
    assert abs(part.mean()) < 4.5 / math.sqrt(part.size)
    assert abs((part * part).mean() - 1) < 4.5 * math.sqrt(2 / part.size)


def test_distribution_and_tails(noise: npt.NDArray[np.float64]) -> None:
    n = noise.size
    thresholds = np.linspace(-5, 5, 41)
    counts = np.searchsorted(np.sort(noise), thresholds)
    for threshold, below in zip(thresholds, counts, strict=True):
        tail = 0.5 * math.erfc(abs(threshold) / math.sqrt(2))
        beyond = below if threshold < 0 else n - below
        assert abs(beyond - n * tail) < 4.5 * math.sqrt(n * tail * (1 - tail)) + 1


def correlation_z(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    return abs(float(a @ b)) / math.sqrt(a.size)  # both have mean 0 and variance 1


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 8, 15, 16, 17, 32, 64, 4096, 1 << 16])
def test_uncorrelated_across_elements(noise: npt.NDArray[np.float64], lag: int) -> None:
    assert correlation_z(noise[:-lag], noise[lag:]) < 4.5
    squares = (noise * noise - 1) / math.sqrt(2)
    assert correlation_z(squares[:-lag], squares[lag:]) < 4.5


def test_uncorrelated_across_steps_chains_seeds_and_streams(module: ModuleType) -> None:
    count = 1 << 19
    base = {"seed": 0, "chain": 0, "step": 0, "stream": 0}
    variants = [base] + [base | {name: value} for name in base for value in (1, 2, 3, 1 << 16, 1 << 31)]
    rows = np.stack([fill_normals(module, count, **v).astype(np.float64) for v in variants])
    for values in (rows, (rows * rows - 1) / math.sqrt(2)):
        gram = values @ values.T / math.sqrt(count)
        np.fill_diagonal(gram, 0.0)
        assert np.abs(gram).max() < 4.5


def test_reference_returns_float32_tensor() -> None:
    xi = philox.normals(1, 2, 3, 10)
    assert xi.dtype == torch.float32
    assert xi.shape == (10,)
    assert torch.equal(xi[:5], philox.normals(1, 2, 3, 5))
    assert not torch.equal(xi, philox.normals(1, 2, 3, 10, stream=2))
