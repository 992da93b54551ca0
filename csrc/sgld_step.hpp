// One SGLD step over flat float32 arrays, with counter-based noise: the interface between bindings, dispatch and the
// three kernels (one per instruction set).
//
//   plain:    w <- w - (lr/2) D + sqrt(lr) xi,              D = n_beta grad + localization (w - anchor)
//   RMSprop:  V <- alpha V + (1 - alpha) grad^2,  G = 1/(sqrt(V) + stability),
//             w <- w - (lr/2) G D + sqrt(lr G) xi
//
// Work per element: 12 bytes read and 4 written (RMSprop: 16 and 8), about 4 multiplies of Philox and 25 of arithmetic.
#pragma once
#include <cstdint>

#include "philox.hpp"
#include "sample_loss.hpp"

namespace lossk {

// Elements per unit of work: 16 Philox counters. A kernel's range starts at a multiple of it.
constexpr std::int64_t kGroup = 64;

struct StepArgs {
  float* w;             // [count], updated in place
  const float* grad;    // [count]
  const float* anchor;  // [count]
  float* square_avg;    // [count], or null: plain SGLD
  bool update_square_avg;
  float grad_scale;    // -(lr/2) n_beta
  float anchor_scale;  // -(lr/2) localization
  float noise_scale;   // sqrt(lr)
  float alpha;
  float one_minus_alpha;
  float stability;
  Stream stream;
};

struct Kernels {
  const char* name;
  // Elements [begin, end) of the arrays.
  void (*step)(const StepArgs&, std::int64_t begin, std::int64_t end);
  // out[begin, end), where out[0] is lane 0 of `first_block` (a multiple of 16).
  void (*normals)(const Stream&, std::uint64_t first_block, float* out, std::int64_t begin, std::int64_t end);
  // The Box-Muller stage alone: words[begin, end) to out[begin, end); whole groups only.
  void (*box_muller)(const std::uint32_t* words, float* out, std::int64_t begin, std::int64_t end);
  void (*words)(const Stream&, std::uint64_t first_block, std::uint32_t* out, std::int64_t begin, std::int64_t end);
  void (*losses)(const LossArgs&, std::int64_t begin, std::int64_t end);  // rows [begin, end)
};

extern const Kernels kBaselineKernels;
#ifdef LOSSK_X86_SIMD
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

// "auto" (the best this CPU has), "avx512", "avx2" or "baseline"; null if it is unknown or cannot run here.
const Kernels* find_kernels(const char* level);

// The operations over [0, count), shared among threads; the result does not depend on num_threads.
void sgld_step(const Kernels& kernels, const StepArgs& args, std::int64_t count, int num_threads);
void fill_normals(const Kernels& kernels, const Stream& stream, std::uint64_t first_block, float* out,
                  std::int64_t count, int num_threads);
void box_muller(const Kernels& kernels, const std::uint32_t* words, float* out, std::int64_t count, int num_threads);
void fill_words(const Kernels& kernels, const Stream& stream, std::uint64_t first_block, std::uint32_t* out,
                std::int64_t count, int num_threads);
void sample_loss(const Kernels& kernels, const LossArgs& args, std::int64_t rows, int num_threads);

}  // namespace lossk
