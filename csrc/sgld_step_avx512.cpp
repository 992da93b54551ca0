// The AVX-512 (F, DQ, VL, BW) kernel. Compiled for that instruction set alone; dispatch.cpp checks the CPU first.
#include <immintrin.h>

#include <cstdint>

namespace lossk {
namespace {

struct V {
  using F = __m512;
  using Single = __m512;
  using U = __m512i;
  static constexpr bool kSingleArithmetic = true;
  static constexpr int kParts = 4;

  static F constant(float c) { return _mm512_set1_ps(c); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F a) { _mm512_storeu_ps(p, a); }
  static void store_words(std::uint32_t* p, U a) { _mm512_storeu_si512(p, a); }
  static U load_words(const std::uint32_t* p) { return _mm512_loadu_si512(p); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F fms(F a, F b, F c) { return _mm512_fmsub_ps(a, b, c); }
  static F sqrt(F a) { return _mm512_sqrt_ps(a); }
  static F as_float(U a) { return _mm512_castsi512_ps(a); }
  static U as_words(F a) { return _mm512_castps_si512(a); }

  // -1/(2a) to within 13 %, for a >= 0 (finite at 0): negating the exponent bits negates the logarithm, roughly.
  static F minus_half_inverse(F a) {
    return as_float(_mm512_sub_epi32(_mm512_set1_epi32(static_cast<int>(0xfe7311c7u)), as_words(a)));
  }

  // 64-bit lanes.
  static U zero() { return _mm512_setzero_si512(); }
  static U wide(std::uint32_t c) { return _mm512_set1_epi64(static_cast<long long>(c)); }
  static U counters() { return _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7); }
  static U add_wide(U a, U b) { return _mm512_add_epi64(a, b); }
  static U multiply(U a, U b) { return _mm512_mul_epu32(a, b); }
  static U high_half(U a) { return _mm512_srli_epi64(a, 32); }
  static U exclusive_or(U a, U b) { return _mm512_xor_si512(a, b); }
  static U exclusive_or(U a, U b, U c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
  static U pack(U low, U high) {
    return as_words(_mm512_shuffle_ps(as_float(low), as_float(high), _MM_SHUFFLE(2, 0, 2, 0)));
  }

  static F unpack_low(F a, F b) { return _mm512_unpacklo_ps(a, b); }
  static F unpack_high(F a, F b) { return _mm512_unpackhi_ps(a, b); }
  static F pairs_low(F a, F b) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  }
  static F pairs_high(F a, F b) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  }

  static F unit_interval(U x) { return fma(_mm512_cvtepu32_ps(x), constant(0x1p-32f), constant(0x1p-33f)); }

  static void split(F u, F& e, F& m) {
    const U shifted = _mm512_sub_epi32(as_words(u), _mm512_set1_epi32(0x3f3504f3));  // sqrt(1/2)
    const U exponent = _mm512_srai_epi32(shifted, 23);
    e = _mm512_cvtepi32_ps(exponent);
    m = as_float(_mm512_sub_epi32(as_words(u), _mm512_slli_epi32(exponent, 23)));
  }

  static F quarter_turn(U y) {
    const U half = _mm512_set1_epi32(1 << 29);
    const U offset = _mm512_and_si512(_mm512_add_epi32(y, half), _mm512_set1_epi32((1 << 30) - 1));
    return fma(_mm512_cvtepi32_ps(_mm512_sub_epi32(offset, half)), constant(0x1p-30f), constant(0x1p-31f));
  }

  // (cos, sin) of b pi/2 becomes that of (q + b) pi/2: exchanged for odd q, cos negated for q = 1, 2, sin for q = 2, 3.
  static void rotate(U y, F& sine, F& cosine) {
    const U turned = _mm512_add_epi32(y, _mm512_set1_epi32(1 << 29));
    const U cosine_turned = _mm512_add_epi32(turned, _mm512_set1_epi32(1 << 30));
    const __mmask16 odd = _mm512_test_epi32_mask(turned, _mm512_set1_epi32(1 << 30));
    const U sign = _mm512_set1_epi32(static_cast<int>(0x80000000u));
    const F c = _mm512_mask_mov_ps(cosine, odd, sine), s = _mm512_mask_mov_ps(sine, odd, cosine);
    cosine = as_float(_mm512_ternarylogic_epi32(as_words(c), cosine_turned, sign, 0x78));  // c ^ (turned & sign)
    sine = as_float(_mm512_ternarylogic_epi32(as_words(s), turned, sign, 0x78));
  }
};

}  // namespace
}  // namespace lossk

#include "vector_group.hpp"

namespace lossk {
const Kernels kAvx512Kernels = {"avx512", step_range<VectorGroup>, normals_range<VectorGroup>,
                                box_muller_range<VectorGroup>, words_range<VectorGroup>, loss_range};
}  // namespace lossk
