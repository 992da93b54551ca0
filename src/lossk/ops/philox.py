"""Counter-based randomness: Philox4x32-10 words and the normals made from them, in numpy. The reference for csrc/.

J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
A word depends on nothing but its key and counter: not on threads, backends, array sizes or earlier calls. Here

    key     = (seed, chain)
    counter = (block & 0xffffffff, block >> 32, step, stream)

with streams 0 a step's noise, 1 minibatches, 2 tuning pilots, 3 first velocities (BAOAB), 4 Metropolis tests,
5 measured acceptances, 6 labels of a Fisher matrix; and element e of a flat buffer is word e % 4 of block e // 4.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lossk.checks import check_integer, plain_scalar, shown

UInt32Array = npt.NDArray[np.uint32]

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_HALF_WORD = np.uint64(32)

# Blocks handled at once: the temporaries of a chunk stay in cache, and a large count costs no extra memory.
_CHUNK_BLOCKS = 1 << 15
MOST_COUNT = 2**36  # words: more than any model has weights


def philox4x32(counter: UInt32Array, key: tuple[int, int]) -> UInt32Array:
    """The four words of each counter.

    Args:
        counter: [n, 4] uint32.
        key: two integers in [0, 2^32).

    Returns:
        [n, 4] uint32.
    """
    _check_words("counter", counter)
    if not isinstance(key, tuple) or len(key) != 2:
        raise TypeError(f"key must be two integers in a tuple, got {shown(key)}")
    key = (check_uint32("key[0]", key[0]), check_uint32("key[1]", key[1]))
    x0, x1, x2, x3 = (counter[:, i].astype(np.uint64) for i in range(4))
    for r in range(_ROUNDS):
        key0, key1 = (np.uint64((key[i] + r * _KEY_STEPS[i]) & 0xFFFFFFFF) for i in range(2))
        p0, p1 = x0 * _MULTIPLIERS[0], x2 * _MULTIPLIERS[1]
        x0, x1 = (p1 >> _HALF_WORD) ^ x1 ^ key0, p1 & _LOW
        x2, x3 = (p0 >> _HALF_WORD) ^ x3 ^ key1, p0 & _LOW
    return np.stack([x0, x1, x2, x3], axis=1).astype(np.uint32)


def uint32_stream(seed: int, chain: int, step: int, stream: int, count: int) -> UInt32Array:
    """The first `count` words, in block order: [count] uint32."""
    seed, chain, step = check_uint32("seed", seed), check_uint32("chain", chain), check_uint32("step", step)
    stream, count = check_uint32("stream", stream), _check_count(count)
    words = np.empty((count + 3) // 4 * 4, dtype=np.uint32)
    for first in range(0, words.size // 4, _CHUNK_BLOCKS):
        chunk = _chunk(seed, chain, step, stream, first, words.size // 4)
        words[4 * first : 4 * first + chunk.size] = chunk.reshape(-1)
    return words[:count]


def _chunk(seed: int, chain: int, step: int, stream: int, first: int, end: int) -> UInt32Array:
    """The words of a chunk's blocks from `first` on, `end` excluded: [n, 4] uint32."""
    blocks = np.arange(first, min(first + _CHUNK_BLOCKS, end), dtype=np.uint64)
    counter = np.empty((blocks.size, 4), dtype=np.uint32)
    counter[:, 0] = (blocks & _LOW).astype(np.uint32)
    counter[:, 1] = (blocks >> _HALF_WORD).astype(np.uint32)
    counter[:, 2] = step
    counter[:, 3] = stream
    return philox4x32(counter, (seed, chain))


def box_muller(words: UInt32Array) -> npt.NDArray[np.float32]:
    """Normals of the four words of each counter: words [n, 4] uint32 -> [n, 4] float32.

    Words (x, y) = (x0, x1) and (x2, x3) give r cos(theta), r sin(theta) with

        u = float32(float32(x) 2^-32 + 2^-33) in (0, 1],      r = sqrt(-2 ln u)
        q = (y + 2^29) >> 30 mod 4,  s = y - q 2^30,          theta = (q + b) pi/2
        b = float32(float32(s) 2^-30 + 2^-31)

    u and b are float32 on purpose: every backend forms them exactly. All else is float64, rounded once at the end.
    """
    _check_words("words", words, (2, 4))
    x, y = words[:, 0::2], words[:, 1::2]
    u = x.astype(np.float32) * np.float32(2**-32) + np.float32(2**-33)
    radius = np.sqrt(-2.0 * np.log(u.astype(np.float64)))
    turned = y + np.uint32(1 << 29)
    q = turned >> np.uint32(30)
    s = (turned & np.uint32((1 << 30) - 1)).astype(np.int32) - np.int32(1 << 29)
    b = s.astype(np.float32) * np.float32(2**-30) + np.float32(2**-31)
    angle = b.astype(np.float64) * (np.pi / 2)
    # Turning by whole quadrants instead of adding q pi/2: the angle keeps its relative accuracy around every axis.
    cosine, sine = np.cos(angle), np.sin(angle)
    out = np.empty(words.shape, dtype=np.float32)
    out[:, 0::2] = radius * np.choose(q, (cosine, -sine, -cosine, sine))
    out[:, 1::2] = radius * np.choose(q, (sine, cosine, -sine, -cosine))
    return out


def normals(seed: int, chain: int, step: int, count: int, *, stream: int = 0) -> torch.Tensor:
    """The first `count` standard normals of a stream: [count] float32, on the CPU."""
    seed, chain, step = check_uint32("seed", seed), check_uint32("chain", chain), check_uint32("step", step)
    stream, count = check_uint32("stream", stream), _check_count(count)
    out, end = np.empty(count, dtype=np.float32), (count + 3) // 4
    for first in range(0, end, _CHUNK_BLOCKS):
        part = box_muller(_chunk(seed, chain, step, stream, first, end)).reshape(-1)
        out[4 * first : 4 * first + part.size] = part[: count - 4 * first]
    return torch.from_numpy(out)


def check_uint32(name: str, value: Any) -> int:
    """An integer in [0, 2^32)."""
    plain = plain_scalar(value)
    if isinstance(plain, bool) or not isinstance(plain, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not 0 <= plain < 2**32:
        raise ValueError(f"{name} must be in [0, 2^32), got {shown(plain)}")
    return int(plain)


def _check_count(count: Any) -> int:
    if isinstance(count, int) and count < 0:
        raise ValueError(f"count must be >= 0, got {count}")
    return check_integer("count", count, 0, ceiling=MOST_COUNT)


def _check_words(name: str, words: Any, widths: tuple[int, ...] = (4,)) -> None:
    if not isinstance(words, np.ndarray):
        raise TypeError(f"{name} must be an array, got {type(words).__name__}")
    if words.dtype != np.uint32 or words.ndim != 2 or words.shape[1] not in widths:
        raise ValueError(f"{name} must be uint32 [n, 4], got {words.dtype} {list(words.shape)}")
