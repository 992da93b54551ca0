// Which kernel runs, and on how many threads.
#include <algorithm>
#include <cstring>
#include <exception>
#include <thread>
#include <vector>

#include "sgld_step.hpp"

namespace lossk {
namespace {

// Below this, starting a thread costs more than it saves (a step takes about 1 ns per element).
constexpr std::int64_t kSmall = 128 * 1024;
// Ranges start on multiples of this many elements: whole groups, and whole pages of aligned arrays.
constexpr std::int64_t kGrain = 4096;
static_assert(kGrain % kGroup == 0, "a range must start at a group");

template <class Body>
void parallel_ranges(std::int64_t count, int num_threads, const Body& body) {
  if (count <= 0) return;
  const std::int64_t grains = (count + kGrain - 1) / kGrain;
  const std::int64_t parts = count < kSmall ? 1 : std::min<std::int64_t>(std::max(num_threads, 1), grains);
  const auto edge = [=](std::int64_t part) { return std::min(count, grains * part / parts * kGrain); };
  std::vector<std::thread> threads;
  threads.reserve(static_cast<std::size_t>(parts));
  std::int64_t started = 1;  // the calling thread takes part 0, and whatever no thread could be started for
  try {
    for (; started < parts; ++started) threads.emplace_back([&, started] { body(edge(started), edge(started + 1)); });
  } catch (const std::exception&) {
    body(edge(started), count);
  }
  body(0, edge(1));
  for (auto& thread : threads) thread.join();
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

}  // namespace lossk
