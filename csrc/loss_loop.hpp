// The loop over rows of logits that the three kernels share, written so that a compiler turns it into vectors: nothing in
// it is specific to an instruction set, and no product is contracted, so all three give the same bits.
// In an unnamed namespace for the reason given in group_loop.hpp.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "sample_loss.hpp"

namespace lossk {
namespace {

constexpr std::int64_t kScratch = 2048;  // float64 gaps held at a time: 16 KB, well inside the first cache

inline double from_bits(std::int64_t bits) {
  double x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

inline std::int64_t to_bits(double x) {
  std::int64_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

// exp of x <= 0, to 2e-10 relative; 0 below -700, where a float32 loss has long been 0.
// x = n ln 2 + r with |r| <= ln 2 / 2; exp(r) is its Taylor polynomial of degree 8 (remainder r^9 / 9!).
inline double exp_of(double x) {
  const double round = 0x1.8p52;  // adding it leaves the nearest integer in the low bits
  const double clamped = x < -700.0 ? -700.0 : x;
  const double shifted = clamped * 1.4426950408889634 + round;
  const double n = shifted - round;
  const double r = (clamped - n * 0x1.62e42fefa38p-1) - n * 0x1.ef35793c7673p-45;
  double p = 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  const double scaled = p * from_bits((to_bits(shifted) + 1023) << 52);
  return x < -700.0 ? 0.0 : scaled;
}

inline float largest(const float* x, std::int64_t count) {
  float top[16];
  std::int64_t i = 0;
  for (int k = 0; k < 16; ++k) top[k] = x[0];
  for (; i + 16 <= count; i += 16)
    for (int k = 0; k < 16; ++k) top[k] = x[i + k] > top[k] ? x[i + k] : top[k];
  for (; i < count; ++i) top[0] = x[i] > top[0] ? x[i] : top[0];
  for (int k = 1; k < 16; ++k) top[0] = top[k] > top[0] ? top[k] : top[0];
  return top[0];
}

// The sum of gaps[0, count), in an order that does not depend on the vector width.
inline double sum_of(const double* gaps, std::int64_t count) {
  double part[8] = {};
  std::int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    for (int k = 0; k < 8; ++k) part[k] += gaps[i + k];
  for (; i < count; ++i) part[0] += gaps[i];
  return ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]));
}

// gaps[0, count) <- exp(x - shift), without the target's own term if it lies in this stretch.
inline void gaps_of(const float* x, double shift, std::int64_t target, std::int64_t count, double* gaps) {
  for (std::int64_t i = 0; i < count; ++i) gaps[i] = static_cast<double>(x[i]) - shift;
  if (target >= 0 && target < count) gaps[target] = -HUGE_VAL;
}

inline float finish(double others, double peak) {
  return static_cast<float>(peak + std::log1p(others + std::expm1(-peak)));
}

// Rows shorter than the scratch: the exponentials of several rows are taken together, however few classes there are.
inline void short_rows(const LossArgs& s, std::int64_t begin, std::int64_t end) {
  double gaps[kScratch], peaks[kScratch];
  const std::int64_t at_a_time = kScratch / s.classes;
  for (std::int64_t first = begin; first < end; first += at_a_time) {
    const std::int64_t rows = end - first < at_a_time ? end - first : at_a_time;
    for (std::int64_t i = 0; i < rows; ++i) {
      const float* x = s.logits + (first + i) * s.stride;
      const std::int64_t target = s.targets[first + i] == kIgnored ? 0 : s.targets[first + i];
      const double top = largest(x, s.classes);
      peaks[i] = top - static_cast<double>(x[target]);
      gaps_of(x, top, target, s.classes, gaps + i * s.classes);
    }
    for (std::int64_t i = 0; i < rows * s.classes; ++i) gaps[i] = exp_of(gaps[i]);
    for (std::int64_t i = 0; i < rows; ++i) {
      if (s.targets[first + i] == kIgnored) {
        s.out[first + i] = 0.0f;
        continue;
      }
      s.out[first + i] = finish(sum_of(gaps + i * s.classes, s.classes), peaks[i]);
    }
  }
}

inline void long_rows(const LossArgs& s, std::int64_t begin, std::int64_t end) {
  double gaps[kScratch];
  for (std::int64_t row = begin; row < end; ++row) {
    const float* x = s.logits + row * s.stride;
    const std::int64_t target = s.targets[row];
    if (target == kIgnored) {
      s.out[row] = 0.0f;
      continue;
    }
    const double top = largest(x, s.classes);
    double others = 0.0;
    for (std::int64_t c = 0; c < s.classes; c += kScratch) {
      const std::int64_t count = s.classes - c < kScratch ? s.classes - c : kScratch;
      gaps_of(x + c, top, target - c, count, gaps);
      for (std::int64_t i = 0; i < count; ++i) gaps[i] = exp_of(gaps[i]);
      others += sum_of(gaps, count);
    }
    s.out[row] = finish(others, top - static_cast<double>(x[target]));
  }
}

inline void loss_range(const LossArgs& args, std::int64_t begin, std::int64_t end) {
  const LossArgs s = args;
  return s.classes <= kScratch ? short_rows(s, begin, end) : long_rows(s, begin, end);
}

}  // namespace
}  // namespace lossk
