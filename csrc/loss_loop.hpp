// The loop over rows of logits that the three kernels share, written so that a compiler turns it into vectors: nothing in
// it is specific to an instruction set, and no product is contracted, so all three give the same bits.
// In an unnamed namespace for the reason given in group_loop.hpp.
#pragma once
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "sample_loss.hpp"

namespace lossk {
namespace {

constexpr std::int64_t kScratch = 4096;  // gaps held at a time: 16 KB, well inside the first cache

inline float from_bits(std::int32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

inline std::int32_t to_bits(float x) {
  std::int32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

// exp of x <= 0, to about 1e-7 relative; 0 below -87, where it is below 1.7e-38 of the largest term, which is 1.
// x = n ln 2 + r with |r| <= ln 2 / 2; exp(r) is its Taylor polynomial of degree 7 (remainder r^8 / 8! < 6e-9).
inline float exp_of(float x) {
  const float round = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  const float clamped = x < -87.0f ? -87.0f : x;
  const float shifted = clamped * 1.44269504f + round;
  const float n = shifted - round;
  const float r = (clamped - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;  // n has 7 bits, its product with the first is exact
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const float scaled = p * from_bits(static_cast<std::int32_t>(static_cast<std::uint32_t>(to_bits(shifted) + 127) << 23));
  return x < -87.0f ? 0.0f : scaled;
}

inline float largest(const float* x, std::int64_t count) {
  float top[16];
  std::int64_t i = 0;
  float best = x[0];
  if (count >= 16) {
    for (int k = 0; k < 16; ++k) top[k] = x[k];
    for (i = 16; i + 16 <= count; i += 16)
      for (int k = 0; k < 16; ++k) top[k] = x[i + k] > top[k] ? x[i + k] : top[k];
    for (int k = 0; k < 16; ++k) best = top[k] > best ? top[k] : best;
  }
  for (; i < count; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

// The sum of gaps[0, count), in an order that does not depend on the vector width: 16 terms at most are added in
// float32, so that the sum is as exact as its terms however many there are.
inline double sum_of(const float* gaps, std::int64_t count) {
  double total = 0.0;
  std::int64_t i = 0;
  while (i + 16 <= count) {
    float part[16] = {};
    const std::int64_t end = count - i < 256 ? i + (count - i) / 16 * 16 : i + 256;
    for (; i < end; i += 16)
      for (int k = 0; k < 16; ++k) part[k] += gaps[i + k];
    for (int k = 0; k < 16; ++k) total += part[k];
  }
  for (; i < count; ++i) total += gaps[i];
  return total;
}

// What the terms of a row are measured from: its largest logit but the target's (0 where all of these are -infinity).
inline float reference(float top) { return top < -FLT_MAX ? 0.0f : top; }

// What a row's terms come to. With m the largest other logit, d = m - x_target and others = sum exp(x_c - m), which is
// at least 1: loss = log1p(e^d others), or, where d > 0, d + log(others + e^-d). d is formed in float64, so a loss keeps
// its digits however small it is.
struct Row {
  double gap;     // d
  double others;  // sum of the other terms

  float loss() const {
    return static_cast<float>(gap <= 0.0 ? std::log1p(std::exp(gap) * others)
                                         : gap + std::log(others + std::exp(-gap)));
  }
  // The softmax of a class is its term times this; the target's slope is -others times it: softmax - 1 without
  // cancellation.
  double softmax_of_term() const {
    const double least = std::exp(gap <= 0.0 ? gap : 0.0);
    return least / (least * others + std::exp(gap <= 0.0 ? 0.0 : -gap));
  }
};

inline void write_slopes(const LossArgs& s, std::int64_t row, const Row& found, const float* terms, std::int64_t first,
                         std::int64_t count) {
  float* slopes = s.slopes + row * s.classes + first;
  const double factor = found.softmax_of_term() * s.slope_scale;
  const float each = static_cast<float>(factor);
  for (std::int64_t i = 0; i < count; ++i) slopes[i] = each * terms[i];
  const std::int64_t target = s.targets[row] - first;
  if (target >= 0 && target < count) slopes[target] = static_cast<float>(-factor * found.others);
}

inline void skip(const LossArgs& s, std::int64_t row) {
  s.out[row] = 0.0f;
  if (s.slopes != nullptr)
    for (std::int64_t i = 0; i < s.classes; ++i) s.slopes[row * s.classes + i] = 0.0f;
}

// Rows shorter than the scratch: the exponentials of several rows are taken together, however few classes there are.
inline void short_rows(const LossArgs& s, std::int64_t begin, std::int64_t end) {
  float terms[kScratch], tops[kScratch];
  const std::int64_t at_a_time = kScratch / s.classes;
  for (std::int64_t first = begin; first < end; first += at_a_time) {
    const std::int64_t rows = end - first < at_a_time ? end - first : at_a_time;
    for (std::int64_t i = 0; i < rows; ++i) {
      const float* x = s.logits + (first + i) * s.stride;
      float* row = terms + i * s.classes;
      for (std::int64_t c = 0; c < s.classes; ++c) row[c] = x[c];
      const std::int64_t target = s.targets[first + i];
      row[target == kIgnored ? 0 : target] = -HUGE_VALF;  // the target itself is not summed
      tops[i] = largest(row, s.classes);
      const float shift = reference(tops[i]);
      for (std::int64_t c = 0; c < s.classes; ++c) row[c] -= shift;
    }
    for (std::int64_t i = 0; i < rows * s.classes; ++i) terms[i] = exp_of(terms[i]);
    for (std::int64_t i = 0; i < rows; ++i) {
      const std::int64_t target = s.targets[first + i];
      if (target == kIgnored) {
        skip(s, first + i);
        continue;
      }
      const float* row = terms + i * s.classes;
      const double own = s.logits[(first + i) * s.stride + target];
      const Row found{static_cast<double>(tops[i]) - own, sum_of(row, s.classes)};
      s.out[first + i] = found.loss();
      if (s.slopes != nullptr) write_slopes(s, first + i, found, row, 0, s.classes);
    }
  }
}

inline void long_rows(const LossArgs& s, std::int64_t begin, std::int64_t end) {
  float terms[kScratch];
  for (std::int64_t row = begin; row < end; ++row) {
    const float* x = s.logits + row * s.stride;
    const std::int64_t target = s.targets[row];
    if (target == kIgnored) {
      skip(s, row);
      continue;
    }
    float top = -HUGE_VALF;
    if (target > 0) top = largest(x, target);
    if (target + 1 < s.classes) {
      const float after = largest(x + target + 1, s.classes - target - 1);
      top = after > top ? after : top;
    }
    const float shift = reference(top);
    const auto terms_from = [&](std::int64_t c, std::int64_t count) {
      for (std::int64_t i = 0; i < count; ++i) terms[i] = x[c + i] - shift;
      if (target >= c && target < c + count) terms[target - c] = -HUGE_VALF;
      for (std::int64_t i = 0; i < count; ++i) terms[i] = exp_of(terms[i]);
    };
    Row found{static_cast<double>(top) - static_cast<double>(x[target]), 0.0};
    for (std::int64_t c = 0; c < s.classes; c += kScratch) {
      const std::int64_t count = s.classes - c < kScratch ? s.classes - c : kScratch;
      terms_from(c, count);
      found.others += sum_of(terms, count);
    }
    s.out[row] = found.loss();
    if (s.slopes == nullptr) continue;
    for (std::int64_t c = 0; c < s.classes; c += kScratch) {
      const std::int64_t count = s.classes - c < kScratch ? s.classes - c : kScratch;
      terms_from(c, count);
      write_slopes(s, row, found, terms, c, count);
    }
  }
}

inline void loss_range(const LossArgs& args, std::int64_t begin, std::int64_t end) {
  const LossArgs s = args;
  return s.classes <= kScratch ? short_rows(s, begin, end) : long_rows(s, begin, end);
}

}  // namespace
}  // namespace lossk
