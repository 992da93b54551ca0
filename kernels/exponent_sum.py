"""A running sum of exponentials kept as s 2^e, e an integer, and the cross entropy that it gives.

e^x is split into p 2^n with p in [sqrt(1/2), sqrt(2)] and n the integer nearest x / ln 2. The reduction x - n ln 2 is
done in two fused steps, so it is exact to a rounding of the *reduced* argument: no maximum is subtracted from any
logit, nothing cancels, and a sum is rescaled by powers of two only, which is exact. What is left per term is the error
of 2^f on |f| <= 1/2: 2^-22.5 at most by NVIDIA's table for ex2.approx.ftz.f32.

The naive exp(x - max) on a GPU is ex2.approx((x - max) log2 e): the product alone is off by |x - max| 2^-24 relative,
4e-6 for the small losses (x - max = -80) that this library is about.

Logits up to 2^22 in size; beyond that sums become infinite, and losses infinite or NaN, never silently wrong.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# ln 2 = 0x1.62e430p-1 - 0x1.05c610p-29, each a float32.
LN2_HIGH = tl.constexpr(float.fromhex("0x1.62e430p-1"))
LN2_LOW = tl.constexpr(float.fromhex("-0x1.05c610p-29"))
LARGEST = tl.constexpr(8388608.0)  # 2^23: of |n|, so that n is an exact float32 and int32
EMPTY = tl.constexpr(-8388608)  # the exponent of an empty sum


@triton.jit
def split_exp(x):
    """e^x = p 2^n: (p float32, n int32). x = -inf gives p = 0; NaN gives p = NaN."""
    n = tl.floor(tl.fma(x, LOG2_E, 0.5))
    n = tl.minimum(tl.maximum(n, -LARGEST), LARGEST)  # a NaN is dropped here, and kept by `reduced`
    reduced = tl.fma(n, -LN2_LOW, tl.fma(n, -LN2_HIGH, x))
    return tl.exp2(reduced * LOG2_E), n.to(tl.int32)


@triton.jit
def power_of_two(k):
    """2^k for integers k <= 127, from its bits; 0 below the normal range of float32 (k < -126)."""
    return ((tl.maximum(k, -127) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def add_block(s, lost, e, x):
    """Add the row sums of e^x to (s + lost) 2^e.

    Args:
        s, lost: [R] float32: the sum and what its roundings have dropped (Knuth's two-sum), both times 2^-e.
        e: [R] int32.
        x: [R, C] float32; -inf adds nothing.
    """
    p, n = split_exp(x)
    new = tl.maximum(e, tl.max(n, axis=1))
    block = tl.sum(p * power_of_two(n - new[:, None]), axis=1)
    shrink = power_of_two(e - new)
    s = s * shrink
    total = s + block
    back = total - s
    lost = lost * shrink + ((s - (total - back)) + (block - back))
    return total, lost, new


@triton.jit
def cross_entropy(s, e, target):
    """log(1 + s 2^e e^-target), in float64: [R] float32, nats.

    s 2^e is the sum of e^x over the other classes and `target` the target's logit, float32. With q the argument after
    the 1: q - q^2/2 below 1e-6 (off by q^2/3), log(1 + q) above (1 + q is off by 1e-16, so 1e-10 of it), and
    log s + log of the rest where q would overflow.
    """
    wide = s.to(tl.float64)
    whole = e.to(tl.float64)
    shift = whole * LN2_HIGH + whole * LN2_LOW - target.to(tl.float64)
    q = wide * tl.exp(tl.minimum(shift, 600.0))
    small = q - 0.5 * q * q
    near = tl.where(q < 1e-6, small, tl.log(1.0 + q))
    far = tl.log(tl.maximum(wide, 1e-300)) + shift
    # A NaN in the sum or in the target would be dropped by the minimum and maximum above: put it back.
    clean = (q == q) & (shift == shift)
    return tl.where(clean, tl.where(shift > 600.0, far, near), q + shift).to(tl.float32)
