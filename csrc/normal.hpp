// Box-Muller from two 32-bit words, by range-reduced polynomials.
//
// Two standard normals r cos(theta), r sin(theta) from words x and y:
//   u = float32(float32(x) 2^-32 + 2^-33) in (0, 1],   r = sqrt(-2 ln u)
//   q = (y + 2^29) >> 30 (mod 4),  s = y - q 2^30 in [-2^29, 2^29),
//   b = float32(float32(s) 2^-30 + 2^-31),             theta = (q + b) pi/2
// u and b are exact in every variant; what follows is evaluated in V's arithmetic F: float32 with fused multiply-add,
// or float64 where there is none.
//
// The coefficients are minimax fits (Remez exchange in 60 digits, weighted to relative error, then rounded to float32);
// each comment gives the largest relative error of the rounded polynomial. Leading terms are split in a float32 and its
// remainder, so that the last operation is the only one whose rounding matters much.
#pragma once
#include <cstdint>

namespace lossk {
namespace {

// -2 ln u. u = m 2^e with m in [sqrt(1/2), sqrt(2)), t = m - 1 (exact): -2 ln u = -2 ln2 e - 2t + t^2 P(t).
// e is 0 near u = 1, so the result keeps its relative accuracy down to u = 1 - 2^-24, and is 0 at u = 1.
template <class V>
inline typename V::F minus_two_log(typename V::Single u) {
  using F = typename V::F;
  F e, m;
  V::split(u, e, m);
  const F t = V::sub(m, V::constant(1.0f));
  F p = V::constant(-0x1.13753cp-3f);  // 2^-28.2
  p = V::fma(p, t, V::constant(0x1.de4022p-3f));
  p = V::fma(p, t, V::constant(-0x1.e7768cp-3f));
  p = V::fma(p, t, V::constant(0x1.fc3464p-3f));
  p = V::fma(p, t, V::constant(-0x1.232d98p-2f));
  p = V::fma(p, t, V::constant(0x1.555ab2p-2f));
  p = V::fma(p, t, V::constant(-0x1.99a53ep-2f));
  p = V::fma(p, t, V::constant(0x1.000012p-1f));
  p = V::fma(p, t, V::constant(-0x1.555546p-1f));
  p = V::fma(p, t, V::constant(1.0f));
  // 2 ln2 = 0x1.62e4p+0 + 0x1.7f7d1cp-19; the first has few enough bits that its product with e is exact.
  const F whole = V::mul(e, V::constant(-0x1.62e4p+0f));
  const F high = V::fma(t, V::constant(-2.0f), whole);
  const F lost = V::fma(t, V::constant(-2.0f), V::sub(whole, high));  // what rounding `high` dropped, exactly
  const F low = V::fma(e, V::constant(-0x1.7f7d1cp-19f), lost);
  return V::add(high, V::fma(V::mul(t, t), p, low));
}

// sin(b pi/2) and cos(b pi/2) for |b| <= 1/2.
template <class V>
inline void sin_cos_quarter(typename V::F b, typename V::F& sine, typename V::F& cosine) {
  using F = typename V::F;
  const F z = V::mul(b, b);
  F p = V::constant(0x1.4be68ep-13f);  // 2^-29.2
  p = V::fma(p, z, V::constant(-0x1.32cb24p-8f));
  p = V::fma(p, z, V::constant(0x1.466bbcp-4f));
  p = V::fma(p, z, V::constant(-0x1.4abbcep-1f));
  p = V::fma(p, z, V::constant(-0x1.777a5cp-25f));  // pi/2 = 0x1.921fb6p+0 - 0x1.777a5cp-25
  sine = V::fma(b, V::constant(0x1.921fb6p+0f), V::mul(b, p));

  const F z_lost = V::fms(b, b, z);  // b^2 - z: what rounding z dropped
  F c = V::constant(0x1.dacc3p-11f);  // 2^-32.8
  c = V::fma(c, z, V::constant(-0x1.55c9ep-6f));
  c = V::fma(c, z, V::constant(0x1.03c1e8p-2f));
  c = V::fma(c, z, V::constant(-0x1.37c8bcp-25f));  // pi^2/8 = 0x1.3bd3ccp+0 + 0x1.37c8bcp-25
  const F small = V::fma(c, z, V::mul(z_lost, V::constant(-0x1.3bd3ccp+0f)));
  cosine = V::add(V::constant(1.0f), V::fma(z, V::constant(-0x1.3bd3ccp+0f), small));
}

// One pair of normals per position. x and y are words, V::U.
template <class V>
inline void box_muller(typename V::U x, typename V::U y, typename V::F& first, typename V::F& second) {
  using F = typename V::F;
  const F squared = minus_two_log<V>(V::unit_interval(x));
  const F radius = V::sqrt(squared);
  F sine, cosine;
  sin_cos_quarter<V>(V::quarter_turn(y), sine, cosine);
  V::rotate(y, sine, cosine);
  if constexpr (V::kSingleArithmetic) {
    // The rounding of the square root is the largest error left: (squared - radius^2) / (2 radius). To remove most of
    // it a few bits of 1/radius do. Enumerating every u and every b, the product is then within 2.22 ulp of the truth,
    // so never more than 2 float32 steps from the correctly rounded value; without this, 2.84.
    const F rounding = V::mul(V::fms(radius, radius, squared), V::minus_half_inverse(radius));
    first = V::fma(radius, cosine, V::mul(rounding, cosine));
    second = V::fma(radius, sine, V::mul(rounding, sine));
  } else {
    first = V::mul(radius, cosine);
    second = V::mul(radius, sine);
  }
}

}  // namespace
}  // namespace lossk
