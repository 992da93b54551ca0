// Two vectors side by side, with the interface of one. Philox and the polynomials are chains of dependent instructions;
// written over Twice<V>, two independent chains alternate in program order, and the CPU has something to do while it
// waits for a result.
#pragma once
#include <cstdint>

namespace lossk {
namespace {

template <class V>
struct Twice {
  struct F {
    typename V::F a, b;
  };
  struct U {
    typename V::U a, b;
  };
  using Single = F;
  static constexpr bool kSingleArithmetic = V::kSingleArithmetic;

  static F constant(float c) { return {V::constant(c), V::constant(c)}; }
  static F add(F x, F y) { return {V::add(x.a, y.a), V::add(x.b, y.b)}; }
  static F sub(F x, F y) { return {V::sub(x.a, y.a), V::sub(x.b, y.b)}; }
  static F mul(F x, F y) { return {V::mul(x.a, y.a), V::mul(x.b, y.b)}; }
  static F fma(F x, F y, F z) { return {V::fma(x.a, y.a, z.a), V::fma(x.b, y.b, z.b)}; }
  static F fms(F x, F y, F z) { return {V::fms(x.a, y.a, z.a), V::fms(x.b, y.b, z.b)}; }
  static F sqrt(F x) { return {V::sqrt(x.a), V::sqrt(x.b)}; }
  static F minus_half_inverse(F x) { return {V::minus_half_inverse(x.a), V::minus_half_inverse(x.b)}; }
  static F unit_interval(U x) { return {V::unit_interval(x.a), V::unit_interval(x.b)}; }
  static F quarter_turn(U x) { return {V::quarter_turn(x.a), V::quarter_turn(x.b)}; }
  static void split(F u, F& e, F& m) {
    V::split(u.a, e.a, m.a);
    V::split(u.b, e.b, m.b);
  }
  static void rotate(U y, F& sine, F& cosine) {
    V::rotate(y.a, sine.a, cosine.a);
    V::rotate(y.b, sine.b, cosine.b);
  }

  static U wide(typename V::U c) { return {c, c}; }
  static U multiply(U x, U y) { return {V::multiply(x.a, y.a), V::multiply(x.b, y.b)}; }
  static U high_half(U x) { return {V::high_half(x.a), V::high_half(x.b)}; }
  static U exclusive_or(U x, U y) { return {V::exclusive_or(x.a, y.a), V::exclusive_or(x.b, y.b)}; }
  static U exclusive_or(U x, U y, U z) {
    return {V::exclusive_or(x.a, y.a, z.a), V::exclusive_or(x.b, y.b, z.b)};
  }
};

}  // namespace
}  // namespace lossk
