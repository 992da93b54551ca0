// Which kernel runs, and on how many threads.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

#include "sgld_step.hpp"

namespace lossk {
namespace {

// Below this, starting a thread costs more than it saves (a step takes about 1 ns per element).
constexpr std::int64_t kSmall = 128 * 1024;
constexpr std::int64_t kChunk = 32 * 1024;
static_assert(kChunk % kGroup == 0, "a range must start at a group");

// body(begin, end) over chunks of fixed size, `unit` elements to a count, taken by whichever thread is free: another process, or torch's idle
// workers, which spin for a while after an operation, may hold one up. An element's value depends on its index alone, so
// neither the number of threads nor who takes which chunk shows in the result.
template <class Body>
void parallel_ranges(std::int64_t count, int num_threads, const Body& body, std::int64_t unit = 1) {
  const std::int64_t chunk = std::max<std::int64_t>(kChunk / unit, 1);
  if (count < kSmall / unit || num_threads == 1) {
    if (count > 0) body(0, count);
    return;
  }
  std::atomic<std::int64_t> next{0};
  const auto work = [&] {
    for (;;) {
      const std::int64_t begin = next.fetch_add(chunk, std::memory_order_relaxed);
      if (begin >= count) return;
      body(begin, std::min(begin + chunk, count));
    }
  };
  const std::int64_t wanted = std::min<std::int64_t>(num_threads, (count + chunk - 1) / chunk);
#ifdef _OPENMP
#pragma omp parallel num_threads(static_cast<int>(wanted))
  work();
#else
  std::vector<std::thread> threads;
  threads.reserve(static_cast<std::size_t>(wanted));
  try {
    while (static_cast<std::int64_t>(threads.size()) + 1 < wanted) threads.emplace_back(work);
  } catch (const std::system_error&) {
    // No more threads to be had: those that run share the work.
  }
  work();
  for (auto& thread : threads) thread.join();
#endif
}

}  // namespace

const Kernels* find_kernels(const char* level) {
  const auto is = [level](const char* name) { return std::strcmp(level, name) == 0; };
#ifdef LOSSK_X86_SIMD
  // These also check that the operating system saves the wide registers.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
  if (avx512 && (is("auto") || is("avx512"))) return &kAvx512Kernels;
  if (avx2 && (is("auto") || is("avx2"))) return &kAvx2Kernels;
#endif
  if (is("auto") || is("baseline")) return &kBaselineKernels;
  return nullptr;
}

void sgld_step(const Kernels& kernels, const StepArgs& args, std::int64_t count, int num_threads) {
  parallel_ranges(count, num_threads,
                  [&](std::int64_t begin, std::int64_t end) { kernels.step(args, begin, end); });
}

void fill_normals(const Kernels& kernels, const Stream& stream, std::uint64_t first_block, float* out,
                  std::int64_t count, int num_threads) {
  parallel_ranges(count, num_threads, [&](std::int64_t begin, std::int64_t end) {
    kernels.normals(stream, first_block, out, begin, end);
  });
}

void box_muller(const Kernels& kernels, const std::uint32_t* words, float* out, std::int64_t count, int num_threads) {
  parallel_ranges(count, num_threads,
                  [&](std::int64_t begin, std::int64_t end) { kernels.box_muller(words, out, begin, end); });
}

void fill_words(const Kernels& kernels, const Stream& stream, std::uint64_t first_block, std::uint32_t* out,
                std::int64_t count, int num_threads) {
  parallel_ranges(count, num_threads, [&](std::int64_t begin, std::int64_t end) {
    kernels.words(stream, first_block, out, begin, end);
  });
}

void sample_loss(const Kernels& kernels, const LossArgs& args, std::int64_t rows, int num_threads) {
  parallel_ranges(
      rows, num_threads, [&](std::int64_t begin, std::int64_t end) { kernels.losses(args, begin, end); }, args.classes);
}

}  // namespace lossk
