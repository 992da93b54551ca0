// lossk._C: pointers and sizes in, checks here, GIL released. Knows nothing of torch, so one build serves every version.
#include <pybind11/pybind11.h>

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "sgld_step.hpp"

namespace py = pybind11;
using namespace py::literals;

namespace {

const lossk::Kernels& kernels_for(const std::string& simd) {
  const lossk::Kernels* kernels = lossk::find_kernels(simd.c_str());
  if (kernels == nullptr)
    throw std::invalid_argument("simd must be auto, avx512, avx2 or baseline, and run on this CPU, got " + simd);
  return *kernels;
}

void check_sizes(std::int64_t count, int num_threads) {
  if (count < 0) throw std::invalid_argument("count must be >= 0, got " + std::to_string(count));
  if (num_threads < 1) throw std::invalid_argument("num_threads must be >= 1, got " + std::to_string(num_threads));
}

// An address of float32 or uint32 elements; null is allowed only where there is nothing to read.
template <class T>
T* pointer(std::uintptr_t address, const char* name, std::int64_t count) {
  if (address == 0 && count > 0) throw std::invalid_argument(std::string(name) + " must not be a null pointer");
  if (address % alignof(T) != 0) throw std::invalid_argument(std::string(name) + " must be aligned to its elements");
  return reinterpret_cast<T*>(address);
}

void check_block(std::uint64_t first_block) {
  if (first_block % (lossk::kGroup / 4) != 0)
    throw std::invalid_argument("first_block must be a multiple of 16, got " + std::to_string(first_block));
}

void sgld_step(std::uintptr_t w, std::uintptr_t grad, std::uintptr_t anchor, std::uintptr_t square_avg,
               std::int64_t count, double lr, double n_beta, double localization, double alpha, double stability,
               bool update_square_avg, std::uint32_t seed, std::uint32_t chain, std::uint32_t step,
               std::uint32_t stream, int num_threads, const std::string& simd) {
  const lossk::Kernels& kernels = kernels_for(simd);
  check_sizes(count, num_threads);
  lossk::StepArgs args{};
  args.w = pointer<float>(w, "w", count);
  args.grad = pointer<const float>(grad, "grad", count);
  args.anchor = pointer<const float>(anchor, "anchor", count);
  args.square_avg = pointer<float>(square_avg, "square_avg", 0);
  args.update_square_avg = update_square_avg;
  args.grad_scale = static_cast<float>(-0.5 * lr * n_beta);
  args.anchor_scale = static_cast<float>(-0.5 * lr * localization);
  args.noise_scale = static_cast<float>(std::sqrt(lr));
  args.alpha = static_cast<float>(alpha);
  args.one_minus_alpha = static_cast<float>(1.0 - alpha);
  args.stability = static_cast<float>(stability);
  args.stream = {seed, chain, step, stream};
  const py::gil_scoped_release release;
  lossk::sgld_step(kernels, args, count, num_threads);
}

void normals(std::uintptr_t out, std::int64_t count, std::uint32_t seed, std::uint32_t chain, std::uint32_t step,
             std::uint32_t stream, std::uint64_t first_block, int num_threads, const std::string& simd) {
  const lossk::Kernels& kernels = kernels_for(simd);
  check_sizes(count, num_threads);
  check_block(first_block);
  float* const target = pointer<float>(out, "out", count);
  const py::gil_scoped_release release;
  lossk::fill_normals(kernels, {seed, chain, step, stream}, first_block, target, count, num_threads);
}

void box_muller(std::uintptr_t words, std::uintptr_t out, std::int64_t count, int num_threads,
                const std::string& simd) {
  const lossk::Kernels& kernels = kernels_for(simd);
  check_sizes(count, num_threads);
  if (count % lossk::kGroup != 0)
    throw std::invalid_argument("count must be a multiple of 64, got " + std::to_string(count));
  const std::uint32_t* const source = pointer<const std::uint32_t>(words, "words", count);
  float* const target = pointer<float>(out, "out", count);
  const py::gil_scoped_release release;
  lossk::box_muller(kernels, source, target, count, num_threads);
}

void philox_fill(std::uintptr_t out, std::int64_t count, std::uint32_t seed, std::uint32_t chain, std::uint32_t step,
                 std::uint32_t stream, std::uint64_t first_block, int num_threads, const std::string& simd) {
  const lossk::Kernels& kernels = kernels_for(simd);
  check_sizes(count, num_threads);
  check_block(first_block);
  std::uint32_t* const target = pointer<std::uint32_t>(out, "out", count);
  const py::gil_scoped_release release;
  lossk::fill_words(kernels, {seed, chain, step, stream}, first_block, target, count, num_threads);
}

void sample_loss(std::uintptr_t logits, std::uintptr_t targets, std::uintptr_t out, std::int64_t rows,
                 std::int64_t classes, std::int64_t stride, std::uintptr_t slopes, double slope_scale, int num_threads,
                 const std::string& simd) {
  const lossk::Kernels& kernels = kernels_for(simd);
  check_sizes(rows, num_threads);
  if (classes < 1) throw std::invalid_argument("classes must be >= 1, got " + std::to_string(classes));
  lossk::LossArgs args{};
  args.logits = pointer<const float>(logits, "logits", rows);
  args.targets = pointer<const std::int64_t>(targets, "targets", rows);
  args.out = pointer<float>(out, "out", rows);
  args.slopes = pointer<float>(slopes, "slopes", 0);
  args.slope_scale = static_cast<float>(slope_scale);
  args.stride = stride;
  args.classes = classes;
  // The kernels index by target: a wrong one must not read elsewhere.
  for (std::int64_t i = 0; i < rows; ++i)
    if (args.targets[i] != lossk::kIgnored && (args.targets[i] < 0 || args.targets[i] >= classes))
      throw std::invalid_argument("targets must lie in [0, " + std::to_string(classes) + "), row " +
                                  std::to_string(i) + " has " + std::to_string(args.targets[i]));
  const py::gil_scoped_release release;
  lossk::sample_loss(kernels, args, rows, num_threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled operations of lossk, over raw float32 and uint32 memory. Use lossk.ops, which checks tensors.";
  m.def("sgld_step", &sgld_step, py::kw_only(), "w"_a, "grad"_a, "anchor"_a, "square_avg"_a, "count"_a, "lr"_a,
        "n_beta"_a, "localization"_a, "alpha"_a, "stability"_a, "update_square_avg"_a, "seed"_a, "chain"_a, "step"_a,
        "stream"_a = 0, "num_threads"_a = 1, "simd"_a = "auto",
        "One SGLD step in place; addresses of float32 [count]; square_avg 0 for the plain step.");
  m.def("normals", &normals, py::kw_only(), "out"_a, "count"_a, "seed"_a, "chain"_a, "step"_a, "stream"_a = 0,
        "first_block"_a = 0, "num_threads"_a = 1, "simd"_a = "auto", "Fill float32 [count] with the stream's normals.");
  m.def("philox_fill", &philox_fill, py::kw_only(), "out"_a, "count"_a, "seed"_a, "chain"_a, "step"_a, "stream"_a = 0,
        "first_block"_a = 0, "num_threads"_a = 1, "simd"_a = "auto", "Fill uint32 [count] with the stream's words.");
  m.def("box_muller", &box_muller, py::kw_only(), "words"_a, "out"_a, "count"_a, "num_threads"_a = 1, "simd"_a = "auto",
        "Turn uint32 [count] of words, four per counter, into float32 [count] of normals, as normals() does.");
  m.def("sample_loss", &sample_loss, py::kw_only(), "logits"_a, "targets"_a, "out"_a, "rows"_a, "classes"_a,
        "stride"_a, "slopes"_a = 0, "slope_scale"_a = 1.0, "num_threads"_a = 1, "simd"_a = "auto",
        "Cross entropy of rows of float32 logits, `stride` elements apart, at int64 targets, into float32 [rows]; and, "
        "where slopes is not 0, slope_scale times its derivatives into float32 [rows, classes].");
  m.def(
      "simd", [](const std::string& level) {
        const lossk::Kernels* kernels = lossk::find_kernels(level.c_str());
        return kernels == nullptr ? std::string() : std::string(kernels->name);
      },
      "level"_a = "auto", "The level that `level` selects on this CPU; empty where it cannot run.");
}
