// A group (16 Philox counters, 64 elements) in SIMD registers: shared by the AVX2 and AVX-512 kernels, which include
// this file after defining their vector type V.
//
// Philox runs in 64-bit lanes (one counter each), where a 32x32->64 multiply is one instruction; the upper halves of
// x1 and x3 hold garbage that nothing reads. Two such vectors are then packed to one of 32-bit lanes. Counters are
// dealt to lanes so that the closing 4x4 transposes within 128-bit parts leave the elements in memory order:
// with L 128-bit parts, position k of part j holds counter j + L k.
#pragma once
#include "group_loop.hpp"
#include "loss_loop.hpp"
#include "normal.hpp"
#include "twice.hpp"

namespace lossk {
namespace {

class VectorGroup {
 public:
  using F = V::F;
  using U = V::U;
  static constexpr int kParts = V::kParts;        // 128-bit parts per vector
  static constexpr int kLanes = 4 * kParts;       // floats per vector, and counters per batch
  static constexpr int kBatch = 4 * kLanes;       // elements per batch
  static constexpr int kBatches = kGroup / kBatch;

  explicit VectorGroup(const PhiloxPlan& plan)
      : round0_x2_(V::wide(plan.round0_x2)), round1_x0_(V::wide(plan.round1_x0)), round1_x2_(V::wide(plan.round1_x2)) {
    for (int r = 0; r < kPhiloxRounds; ++r) {
      key0_[r] = V::wide(plan.key0[r]);
      key1_[r] = V::wide(plan.key1[r]);
    }
  }

  void words(std::uint32_t block_low, std::uint32_t* out) const {
    for (int n = 0; n < kBatches; ++n) {
      U x[4];
      F rows[4];
      philox(block_low + n * kLanes, x);
      for (int k = 0; k < 4; ++k) rows[k] = V::as_float(x[k]);
      transpose(rows);
      for (int k = 0; k < 4; ++k) V::store_words(out + n * kBatch + k * kLanes, V::as_words(rows[k]));
    }
  }

  void normals(std::uint32_t block_low, float* out) const {
    for (int n = 0; n < kBatches; ++n) {
      F xi[4];
      noise(block_low + n * kLanes, xi);
      for (int k = 0; k < 4; ++k) V::store(out + n * kBatch + k * kLanes, xi[k]);
    }
  }

  static void normals_of(const std::uint32_t* words, float* out) {
    for (int n = 0; n < kBatches; ++n) {
      F rows[4], xi[4];
      for (int k = 0; k < 4; ++k) rows[k] = V::as_float(V::load_words(words + n * kBatch + k * kLanes));
      transpose(rows);
      const U x[4] = {V::as_words(rows[0]), V::as_words(rows[1]), V::as_words(rows[2]), V::as_words(rows[3])};
      transform(x, xi);
      for (int k = 0; k < 4; ++k) V::store(out + n * kBatch + k * kLanes, xi[k]);
    }
  }

  template <bool kRms, bool kUpdate>
  void step(const StepArgs& s, std::uint32_t block_low, float* w, const float* grad, const float* anchor,
            float* square_avg) const {
    for (int n = 0; n < kBatches; ++n) {
      F xi[4];
      noise(block_low + n * kLanes, xi);
      for (int k = 0; k < 4; ++k) {
        const int i = n * kBatch + k * kLanes;
        const F weight = V::load(w + i);
        const F g = V::load(grad + i);
        const F pull = V::mul(V::constant(s.anchor_scale), V::sub(weight, V::load(anchor + i)));
        const F drift = V::fma(V::constant(s.grad_scale), g, pull);
        if constexpr (kRms) {
          F v = V::load(square_avg + i);
          if constexpr (kUpdate) {
            v = V::fma(V::constant(s.alpha), v, V::mul(V::constant(s.one_minus_alpha), V::mul(g, g)));
            V::store(square_avg + i, v);
          }
          const F gain = V::div(V::constant(1.0f), V::add(V::sqrt(v), V::constant(s.stability)));
          const F noise_gain = V::mul(V::constant(s.noise_scale), V::sqrt(gain));
          V::store(w + i, V::add(weight, V::fma(gain, drift, V::mul(noise_gain, xi[k]))));
        } else {
          V::store(w + i, V::add(weight, V::fma(V::constant(s.noise_scale), xi[k], drift)));
        }
      }
    }
  }

 private:
  // Words x0..x3 of the kLanes counters from block_low on. The low and high halves of the packed vectors run side by side.
  void philox(std::uint32_t block_low, U x[4]) const {
    using W = Twice<V>;
    const typename W::U m0 = W::wide(V::wide(kPhiloxM0)), m1 = W::wide(V::wide(kPhiloxM1));
    const U counter = V::add_wide(V::wide(block_low), V::counters());
    typename W::U p0 = W::multiply(m0, {counter, V::add_wide(counter, V::wide(2 * kParts))});
    typename W::U x2 = W::exclusive_or(W::high_half(p0), W::wide(round0_x2_));
    typename W::U p1 = W::multiply(m1, x2);
    typename W::U x0 = W::exclusive_or(W::high_half(p1), W::wide(round1_x0_));
    typename W::U x1 = p1;
    x2 = W::exclusive_or(p0, W::wide(round1_x2_));
    typename W::U x3 = W::wide(V::zero());  // constant at this point, and part of key1_[2]
    for (int r = 2; r < kPhiloxRounds; ++r) {
      p0 = W::multiply(m0, x0);
      p1 = W::multiply(m1, x2);
      x0 = W::exclusive_or(W::high_half(p1), x1, W::wide(key0_[r]));
      x2 = W::exclusive_or(W::high_half(p0), x3, W::wide(key1_[r]));
      x1 = p1;
      x3 = p0;
    }
    x[0] = V::pack(x0.a, x0.b);
    x[1] = V::pack(x1.a, x1.b);
    x[2] = V::pack(x2.a, x2.b);
    x[3] = V::pack(x3.a, x3.b);
  }

  // kBatch normals in memory order.
  void noise(std::uint32_t block_low, F xi[4]) const {
    U x[4];
    philox(block_low, x);
    transform(x, xi);
  }

  // Words x0..x3 of kLanes counters to kBatch normals in memory order.
  static void transform(const U x[4], F xi[4]) {
    typename Twice<V>::F first, second;
    box_muller<Twice<V>>({x[0], x[2]}, {x[1], x[3]}, first, second);
    xi[0] = first.a;
    xi[1] = second.a;
    xi[2] = first.b;
    xi[3] = second.b;
    transpose(xi);
  }

  // Between one vector per word of the counter and one vector per kParts counters; its own inverse.
  static void transpose(F rows[4]) {
    const F a = V::unpack_low(rows[0], rows[1]), b = V::unpack_high(rows[0], rows[1]);
    const F c = V::unpack_low(rows[2], rows[3]), d = V::unpack_high(rows[2], rows[3]);
    rows[0] = V::pairs_low(a, c);
    rows[1] = V::pairs_high(a, c);
    rows[2] = V::pairs_low(b, d);
    rows[3] = V::pairs_high(b, d);
  }

  U round0_x2_, round1_x0_, round1_x2_;
  U key0_[kPhiloxRounds], key1_[kPhiloxRounds];
};

}  // namespace
}  // namespace lossk
