// The kernel for any CPU: plain loops over a group, which compilers vectorise for whatever they target.
// Without a guaranteed fused multiply-add, the normals are evaluated in float64 and rounded once.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "group_loop.hpp"
#include "loss_loop.hpp"
#include "normal.hpp"

namespace lossk {
namespace {

struct Scalar {
  using F = double;
  using Single = float;
  using U = std::uint32_t;
  static constexpr bool kSingleArithmetic = false;

  static double constant(float c) { return c; }
  static double add(double a, double b) { return a + b; }
  static double sub(double a, double b) { return a - b; }
  static double mul(double a, double b) { return a * b; }
  static double fma(double a, double b, double c) { return a * b + c; }
  static double fms(double a, double b, double c) { return a * b - c; }
  static double sqrt(double a) { return std::sqrt(a); }

  static float unit_interval(std::uint32_t x) {
    // By halves, as most CPUs convert signed words only: each is an exact float32, and their sum rounds once.
    const float high = static_cast<float>(static_cast<std::int32_t>(x >> 16)) * 0x1p16f;
    const float low = static_cast<float>(static_cast<std::int32_t>(x & 0xffffu));
    return (high + low) * 0x1p-32f + 0x1p-33f;
  }

  static void split(float u, double& e, double& m) {
    std::int32_t bits;
    std::memcpy(&bits, &u, sizeof bits);
    const std::int32_t exponent = (bits - 0x3f3504f3) >> 23;  // sqrt(1/2)
    const std::int32_t mantissa = bits - exponent * (1 << 23);
    float m_single;
    std::memcpy(&m_single, &mantissa, sizeof m_single);
    e = exponent;
    m = m_single;
  }

  static double quarter_turn(std::uint32_t y) {
    const std::int32_t s = static_cast<std::int32_t>((y + (1u << 29)) & ((1u << 30) - 1)) - (1 << 29);
    return static_cast<float>(s) * 0x1p-30f + 0x1p-31f;
  }

  // (cos, sin) of b pi/2 becomes that of (q + b) pi/2: exchanged for odd q, cos negated for q = 1, 2, sin for q = 2, 3.
  static void rotate(std::uint32_t y, double& sine, double& cosine) {
    const std::uint32_t q = (y + (1u << 29)) >> 30;
    const double s = (q & 1) ? cosine : sine, c = (q & 1) ? sine : cosine;
    sine = (q & 2) ? -s : s;
    cosine = ((q + 1) & 2) ? -c : c;
  }
};

class PlainGroup {
 public:
  explicit PlainGroup(const PhiloxPlan& plan) : plan_(plan) {}

  void words(std::uint32_t block_low, std::uint32_t* out) const {
    std::uint32_t x[4][kCounters];
    philox(block_low, x);
    for (int i = 0; i < kCounters; ++i)
      for (int k = 0; k < 4; ++k) out[4 * i + k] = x[k][i];
  }

  void normals(std::uint32_t block_low, float* out) const {
    std::uint32_t x[4][kCounters];
    philox(block_low, x);
    transform(x, out);
  }

  static void normals_of(const std::uint32_t* words, float* out) {
    std::uint32_t x[4][kCounters];
    for (int i = 0; i < kCounters; ++i)
      for (int k = 0; k < 4; ++k) x[k][i] = words[4 * i + k];
    transform(x, out);
  }

  template <bool kRms, bool kUpdate>
  void step(const StepArgs& s, std::uint32_t block_low, float* w, const float* grad, const float* anchor,
            float* square_avg) const {
    float xi[kGroup];
    normals(block_low, xi);
    for (int i = 0; i < kGroup; ++i) {
      const float drift = s.grad_scale * grad[i] + s.anchor_scale * (w[i] - anchor[i]);
      if constexpr (kRms) {
        float v = square_avg[i];
        if constexpr (kUpdate) {
          v = s.alpha * v + s.one_minus_alpha * (grad[i] * grad[i]);
          square_avg[i] = v;
        }
        const float gain = 1.0f / (std::sqrt(v) + s.stability);
        w[i] += gain * drift + s.noise_scale * std::sqrt(gain) * xi[i];
      } else {
        w[i] += s.noise_scale * xi[i] + drift;
      }
    }
  }

 private:
  static constexpr int kCounters = kGroup / 4;

  static void transform(const std::uint32_t x[4][kCounters], float* out) {
    float xi[4][kCounters];
    for (int pair = 0; pair < 4; pair += 2) {
      for (int i = 0; i < kCounters; ++i) {
        double first, second;
        box_muller<Scalar>(x[pair][i], x[pair + 1][i], first, second);
        xi[pair][i] = static_cast<float>(first);
        xi[pair + 1][i] = static_cast<float>(second);
      }
    }
    for (int i = 0; i < kCounters; ++i)
      for (int k = 0; k < 4; ++k) out[4 * i + k] = xi[k][i];
  }

  void philox(std::uint32_t block_low, std::uint32_t x[4][kCounters]) const {
    for (int i = 0; i < kCounters; ++i) {
      std::uint64_t p0 = std::uint64_t{kPhiloxM0} * (block_low + static_cast<std::uint32_t>(i));
      std::uint32_t x2 = high_word(p0) ^ plan_.round0_x2;
      std::uint64_t p1 = std::uint64_t{kPhiloxM1} * x2;
      std::uint32_t x0 = high_word(p1) ^ plan_.round1_x0;
      std::uint32_t x1 = low_word(p1);
      x2 = low_word(p0) ^ plan_.round1_x2;
      std::uint32_t x3 = 0;  // constant at this point, and part of plan_.key1[2]
      for (int r = 2; r < kPhiloxRounds; ++r) {
        p0 = std::uint64_t{kPhiloxM0} * x0;
        p1 = std::uint64_t{kPhiloxM1} * x2;
        x0 = high_word(p1) ^ x1 ^ plan_.key0[r];
        x2 = high_word(p0) ^ x3 ^ plan_.key1[r];
        x1 = low_word(p1);
        x3 = low_word(p0);
      }
      x[0][i] = x0;
      x[1][i] = x1;
      x[2][i] = x2;
      x[3][i] = x3;
    }
  }

  PhiloxPlan plan_;
};

}  // namespace

const Kernels kBaselineKernels = {"baseline", step_range<PlainGroup>, normals_range<PlainGroup>,
                                  box_muller_range<PlainGroup>, words_range<PlainGroup>, loss_range};
}  // namespace lossk
