// The AVX2 + FMA kernel. Compiled for that instruction set alone; dispatch.cpp checks the CPU first.
// It performs the AVX-512 kernel's operations in the same order, so the two agree bit for bit.
#include <immintrin.h>

#include <cstdint>

namespace lossk {
namespace {

struct V {
  using F = __m256;
  using Single = __m256;
  using U = __m256i;
  static constexpr bool kSingleArithmetic = true;
  static constexpr int kParts = 2;

  static F constant(float c) { return _mm256_set1_ps(c); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F a) { _mm256_storeu_ps(p, a); }
  static void store_words(std::uint32_t* p, U a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }
  static U load_words(const std::uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F fms(F a, F b, F c) { return _mm256_fmsub_ps(a, b, c); }
  static F sqrt(F a) { return _mm256_sqrt_ps(a); }
  static F as_float(U a) { return _mm256_castsi256_ps(a); }
  static U as_words(F a) { return _mm256_castps_si256(a); }

  // -1/(2a) to within 13 %, for a >= 0 (finite at 0): negating the exponent bits negates the logarithm, roughly.
  static F minus_half_inverse(F a) {
    return as_float(_mm256_sub_epi32(_mm256_set1_epi32(static_cast<int>(0xfe7311c7u)), as_words(a)));
  }

  // 64-bit lanes.
  static U zero() { return _mm256_setzero_si256(); }
  static U wide(std::uint32_t c) { return _mm256_set1_epi64x(static_cast<long long>(c)); }
  static U counters() { return _mm256_setr_epi64x(0, 2, 1, 3); }
  static U add_wide(U a, U b) { return _mm256_add_epi64(a, b); }
  static U multiply(U a, U b) { return _mm256_mul_epu32(a, b); }
  static U high_half(U a) { return _mm256_srli_epi64(a, 32); }
  static U exclusive_or(U a, U b) { return _mm256_xor_si256(a, b); }
  static U exclusive_or(U a, U b, U c) { return _mm256_xor_si256(a, _mm256_xor_si256(b, c)); }
  static U pack(U low, U high) {
    return as_words(_mm256_shuffle_ps(as_float(low), as_float(high), _MM_SHUFFLE(2, 0, 2, 0)));
  }

  static F unpack_low(F a, F b) { return _mm256_unpacklo_ps(a, b); }
  static F unpack_high(F a, F b) { return _mm256_unpackhi_ps(a, b); }
  static F pairs_low(F a, F b) {
    return _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(a), _mm256_castps_pd(b)));
  }
  static F pairs_high(F a, F b) {
    return _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(a), _mm256_castps_pd(b)));
  }

  // AVX2 converts signed words only. The two halves, placed in the mantissas of 2^39 and 2^23, are exact floats, and
  // their sum less both offsets rounds once: the nearest float32 of the unsigned word.
  static F unit_interval(U x) {
    const U high = _mm256_or_si256(_mm256_srli_epi32(x, 16), _mm256_set1_epi32(0x53000000));
    const U low = _mm256_blend_epi16(x, _mm256_set1_epi32(0x4b000000), 0xAA);
    const F word = add(sub(as_float(high), constant(0x1p39f + 0x1p23f)), as_float(low));
    return fma(word, constant(0x1p-32f), constant(0x1p-33f));
  }

  static void split(F u, F& e, F& m) {
    const U shifted = _mm256_sub_epi32(as_words(u), _mm256_set1_epi32(0x3f3504f3));  // sqrt(1/2)
    const U exponent = _mm256_srai_epi32(shifted, 23);
    e = _mm256_cvtepi32_ps(exponent);
    m = as_float(_mm256_sub_epi32(as_words(u), _mm256_slli_epi32(exponent, 23)));
  }

  static F quarter_turn(U y) {
    const U half = _mm256_set1_epi32(1 << 29);
    const U offset = _mm256_and_si256(_mm256_add_epi32(y, half), _mm256_set1_epi32((1 << 30) - 1));
    return fma(_mm256_cvtepi32_ps(_mm256_sub_epi32(offset, half)), constant(0x1p-30f), constant(0x1p-31f));
  }

  // (cos, sin) of b pi/2 becomes that of (q + b) pi/2: exchanged for odd q, cos negated for q = 1, 2, sin for q = 2, 3.
  static void rotate(U y, F& sine, F& cosine) {
    const U turned = _mm256_add_epi32(y, _mm256_set1_epi32(1 << 29));
    const U cosine_turned = _mm256_add_epi32(turned, _mm256_set1_epi32(1 << 30));
    const F odd = as_float(_mm256_slli_epi32(turned, 1));  // bit 30 at the sign, which is all that blendv reads
    const U sign = _mm256_set1_epi32(static_cast<int>(0x80000000u));
    const F c = _mm256_blendv_ps(cosine, sine, odd), s = _mm256_blendv_ps(sine, cosine, odd);
    cosine = _mm256_xor_ps(c, as_float(_mm256_and_si256(cosine_turned, sign)));
    sine = _mm256_xor_ps(s, as_float(_mm256_and_si256(turned, sign)));
  }
};

}  // namespace
}  // namespace lossk

#include "vector_group.hpp"

namespace lossk {
const Kernels kAvx2Kernels = {"avx2", step_range<VectorGroup>, normals_range<VectorGroup>,
                              box_muller_range<VectorGroup>, words_range<VectorGroup>, loss_range};
}  // namespace lossk
