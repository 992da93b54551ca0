"""Philox words and the normals made from them: the stream of `lossk.ops.philox`, four elements per counter.

The words are the reference's bit for bit. The normals are csrc/normal.hpp's float32 arithmetic, with its polynomials
(minimax fits, rounded to float32) and its fused multiply-adds; every operation used is correctly rounded on a GPU
(fma, div.rn, sqrt.rn), so that what is within 2 ulp of the reference in the interpreter is so there.
"""

import triton
import triton.language as tl
from torch import Tensor

from lossk.kernels.launch import Config, launch, signed

# Horner coefficients, highest power first. The comments give the polynomials' largest relative errors.
L9 = tl.constexpr(float.fromhex("-0x1.13753cp-3"))  # of -2 ln(1 + t) + 2t over t^2: 2^-28.2
L8 = tl.constexpr(float.fromhex("0x1.de4022p-3"))
L7 = tl.constexpr(float.fromhex("-0x1.e7768cp-3"))
L6 = tl.constexpr(float.fromhex("0x1.fc3464p-3"))
L5 = tl.constexpr(float.fromhex("-0x1.232d98p-2"))
L4 = tl.constexpr(float.fromhex("0x1.555ab2p-2"))
L3 = tl.constexpr(float.fromhex("-0x1.99a53ep-2"))
L2 = tl.constexpr(float.fromhex("0x1.000012p-1"))
L1 = tl.constexpr(float.fromhex("-0x1.555546p-1"))
# 2 ln 2 in two parts; the first has few enough bits that its product with an exponent is exact.
TWO_LN2_HIGH = tl.constexpr(float.fromhex("0x1.62e4p+0"))
TWO_LN2_LOW = tl.constexpr(float.fromhex("0x1.7f7d1cp-19"))
S3 = tl.constexpr(float.fromhex("0x1.4be68ep-13"))  # of sin(b pi/2) over b, less pi/2: 2^-29.2
S2 = tl.constexpr(float.fromhex("-0x1.32cb24p-8"))
S1 = tl.constexpr(float.fromhex("0x1.466bbcp-4"))
S0 = tl.constexpr(float.fromhex("-0x1.4abbcep-1"))
HALF_PI = tl.constexpr(float.fromhex("0x1.921fb6p+0"))
HALF_PI_LOW = tl.constexpr(float.fromhex("-0x1.777a5cp-25"))
C2 = tl.constexpr(float.fromhex("0x1.dacc3p-11"))  # of cos(b pi/2): 2^-32.8
C1 = tl.constexpr(float.fromhex("-0x1.55c9ep-6"))
C0 = tl.constexpr(float.fromhex("0x1.03c1e8p-2"))
EIGHTH_PI2 = tl.constexpr(float.fromhex("0x1.3bd3ccp+0"))
EIGHTH_PI2_LOW = tl.constexpr(float.fromhex("0x1.37c8bcp-25"))


@triton.jit
def philox_words(block, seed, chain, step, stream):
    """The words of counters `block` [n] int64; the rest int32 scalars, the bits of 32-bit words: four [n] uint32."""
    low = (block & 0xFFFFFFFF).to(tl.uint32)
    high = (block >> 32).to(tl.uint32)
    third = tl.zeros_like(low) + step.to(tl.uint32, bitcast=True)
    fourth = tl.zeros_like(low) + stream.to(tl.uint32, bitcast=True)
    key0 = tl.zeros_like(low) + seed.to(tl.uint32, bitcast=True)
    key1 = tl.zeros_like(low) + chain.to(tl.uint32, bitcast=True)
    return tl.philox_impl(low, high, third, fourth, key0, key1)


@triton.jit
def minus_two_log(u):
    """-2 ln u for u in (0, 1]. u = m 2^e with m in [sqrt(1/2), sqrt(2)), t = m - 1 exactly."""
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # the bits of sqrt(1/2)
    e = exponent.to(tl.float32)
    t = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    p = tl.fma(t, L9, L8)
    p = tl.fma(p, t, L7)
    p = tl.fma(p, t, L6)
    p = tl.fma(p, t, L5)
    p = tl.fma(p, t, L4)
    p = tl.fma(p, t, L3)
    p = tl.fma(p, t, L2)
    p = tl.fma(p, t, L1)
    p = tl.fma(p, t, 1.0)
    whole = e * -TWO_LN2_HIGH
    high = tl.fma(t, -2.0, whole)
    lost = tl.fma(t, -2.0, whole - high)  # what rounding `high` dropped, exactly
    return high + tl.fma(t * t, p, tl.fma(e, -TWO_LN2_LOW, lost))


@triton.jit
def turned_sine_cosine(y):
    """sin and cos of the angle of words y: theta = (q + b) pi/2 with |b| <= 1/2, turned by whole quadrants."""
    turned = y + 0x20000000
    s = (turned & 0x3FFFFFFF).to(tl.int32) - 0x20000000
    b = tl.fma(s.to(tl.float32), 2.0**-30, 2.0**-31)
    z = b * b
    p = tl.fma(z, S3, S2)
    p = tl.fma(p, z, S1)
    p = tl.fma(p, z, S0)
    p = tl.fma(p, z, HALF_PI_LOW)
    sine = tl.fma(b, HALF_PI, b * p)
    z_lost = tl.fma(b, b, -z)
    c = tl.fma(z, C2, C1)
    c = tl.fma(c, z, C0)
    c = tl.fma(c, z, -EIGHTH_PI2_LOW)
    cosine = 1.0 + tl.fma(z, -EIGHTH_PI2, tl.fma(c, z, z_lost * -EIGHTH_PI2))
    q = (turned >> 30).to(tl.int32)
    odd = (q & 1) != 0
    first = tl.where(odd, sine, cosine)
    second = tl.where(odd, cosine, sine)
    return tl.where((q & 2) != 0, -second, second), tl.where(((q + 1) & 2) != 0, -first, first)


@triton.jit
def box_muller(x, y):
    """Two normals r cos(theta), r sin(theta) of words x, y [n] uint32; see `lossk.ops.philox.box_muller`."""
    u = tl.fma(x.to(tl.float32), 2.0**-32, 2.0**-33)
    squared = minus_two_log(u)
    radius = tl.sqrt_rn(squared)
    sine, cosine = turned_sine_cosine(y)
    # What rounding the square root dropped, to first order; a few bits of it do. At u = 1 the radius is 0.
    lost = tl.fma(-radius, radius, squared) * (0.5 / tl.maximum(radius, 1e-20))
    return tl.fma(radius, cosine, lost * cosine), tl.fma(radius, sine, lost * sine)


@triton.jit
def normals_of_blocks(block, seed, chain, step, stream):
    """The normals of counters `block` [n] int64, in element order: [4 n] float32."""
    x0, x1, x2, x3 = philox_words(block, seed, chain, step, stream)
    n0, n1 = box_muller(x0, x1)
    n2, n3 = box_muller(x2, x3)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))


@triton.jit(do_not_specialize=["count", "first_block", "seed", "chain", "step", "stream"])
def normals_kernel(
    out_ptr,
    count: tl.int64,
    first_block: tl.int64,
    seed: tl.int32,
    chain: tl.int32,
    step: tl.int32,
    stream: tl.int32,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    block = first_block + start + tl.arange(0, BLOCK)
    element = 4 * start + tl.arange(0, 4 * BLOCK)
    if WORDS:
        x0, x1, x2, x3 = philox_words(block, seed, chain, step, stream)
        words = tl.interleave(tl.interleave(x0, x2), tl.interleave(x1, x3))
        tl.store(out_ptr + element, words.to(tl.int32, bitcast=True), mask=element < count)
    else:
        xi = normals_of_blocks(block, seed, chain, step, stream)
        tl.store(out_ptr + element, xi, mask=element < count)


def configs() -> list[Config]:
    """Both forms: words as int32, and normals."""
    types = ["i64", "i64", "i32", "i32", "i32", "i32"]
    return [
        Config(normals_kernel, label, [pointer, *types], {"WORDS": words, "BLOCK": 256})
        for label, pointer, words in (("words", "*i32", True), ("normals", "*fp32", False))
    ]


def fill(out: Tensor, seed: int, chain: int, step: int, stream: int = 0, first_block: int = 0) -> None:
    """Fill out [n] with the stream's words (int32: their bits) or normals (float32), from counter `first_block` on."""
    words, normals = configs()
    config = normals if out.is_floating_point() else words
    programs = triton.cdiv(out.numel(), 4 * config.constants["BLOCK"])
    key = (signed(word) for word in (seed, chain, step, stream))
    launch(config, programs, out, out.numel(), first_block, *key)
