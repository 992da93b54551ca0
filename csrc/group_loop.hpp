// The loop that the three kernels share: from a range of elements to whole groups of kGroup, with the ragged end
// computed in padded local arrays by the same code, so that an element's value never depends on where a range ends.
//
// G, a type of the including file, provides (see sgld_step_baseline.cpp for the plain version):
//   G(const PhiloxPlan&)
//   void words(uint32_t block_low, uint32_t* out) const      out[kGroup]
//   void normals(uint32_t block_low, float* out) const       out[kGroup]
//   static void normals_of(const uint32_t* words, float* out)
//   template <bool kRms, bool kUpdate> void step(const StepArgs&, uint32_t block_low, float* w, const float* g,
//                                            const float* a, float* v) const
// Everything is in an unnamed namespace: these files are compiled for different instruction sets, and a linker that
// merged their copies could hand AVX-512 code to a machine without it.
#pragma once
#include <cstdint>
#include <cstring>

#include "sgld_step.hpp"

namespace lossk {
namespace {

// Calls body(group, low half of the block number, index of the group's first element) for each group of [begin, end).
template <class G, class Body>
inline void for_each_group(const Stream& stream, std::uint64_t first_block, std::int64_t begin, std::int64_t end,
                           const Body& body) {
  std::int64_t element = begin;
  while (element < end) {
    // The plan holds while the high half of the block number stays: 2^34 elements, so nearly always to the end.
    const std::uint64_t block = first_block + static_cast<std::uint64_t>(element) / 4;
    const std::uint64_t blocks_left = (std::uint64_t{1} << 32) - (block & 0xffffffffu);
    const std::int64_t reach = element + static_cast<std::int64_t>(blocks_left * 4);
    const std::int64_t stop = reach < end ? reach : end;
    const G group(make_plan(stream, static_cast<std::uint32_t>(block >> 32)));
    std::uint32_t block_low = static_cast<std::uint32_t>(block);
    for (; element < stop; element += kGroup, block_low += kGroup / 4) body(group, block_low, element);
  }
}

template <class G>
void words_range(const Stream& stream, std::uint64_t first_block, std::uint32_t* out, std::int64_t begin,
                 std::int64_t end) {
  for_each_group<G>(stream, first_block, begin, end, [=](const G& group, std::uint32_t block, std::int64_t i) {
    if (i + kGroup <= end) return group.words(block, out + i);
    std::uint32_t padded[kGroup];
    group.words(block, padded);
    std::memcpy(out + i, padded, static_cast<std::size_t>(end - i) * sizeof(padded[0]));
  });
}

template <class G>
void box_muller_range(const std::uint32_t* words, float* out, std::int64_t begin, std::int64_t end) {
  for (std::int64_t i = begin; i < end; i += kGroup) G::normals_of(words + i, out + i);
}

template <class G>
void normals_range(const Stream& stream, std::uint64_t first_block, float* out, std::int64_t begin, std::int64_t end) {
  for_each_group<G>(stream, first_block, begin, end, [=](const G& group, std::uint32_t block, std::int64_t i) {
    if (i + kGroup <= end) return group.normals(block, out + i);
    float padded[kGroup];
    group.normals(block, padded);
    std::memcpy(out + i, padded, static_cast<std::size_t>(end - i) * sizeof(padded[0]));
  });
}

template <class G, bool kRms, bool kUpdate>
void step_range_as(const StepArgs& args, std::int64_t begin, std::int64_t end) {
  const StepArgs s = args;  // a copy: stores through w cannot change it, so its fields stay in registers
  for_each_group<G>(s.stream, 0, begin, end, [&s, end](const G& group, std::uint32_t block, std::int64_t i) {
    if (i + kGroup <= end) {
      group.template step<kRms, kUpdate>(s, block, s.w + i, s.grad + i, s.anchor + i, kRms ? s.square_avg + i : nullptr);
      return;
    }
    const std::size_t bytes = static_cast<std::size_t>(end - i) * sizeof(float);
    float w[kGroup] = {}, g[kGroup] = {}, a[kGroup] = {}, v[kGroup] = {};
    std::memcpy(w, s.w + i, bytes);
    std::memcpy(g, s.grad + i, bytes);
    std::memcpy(a, s.anchor + i, bytes);
    if (kRms) std::memcpy(v, s.square_avg + i, bytes);
    group.template step<kRms, kUpdate>(s, block, w, g, a, v);
    std::memcpy(s.w + i, w, bytes);
    if (kRms && kUpdate) std::memcpy(s.square_avg + i, v, bytes);
  });
}

template <class G>
void step_range(const StepArgs& args, std::int64_t begin, std::int64_t end) {
  if (args.square_avg == nullptr) return step_range_as<G, false, false>(args, begin, end);
  if (args.update_square_avg) return step_range_as<G, true, true>(args, begin, end);
  return step_range_as<G, true, false>(args, begin, end);
}

}  // namespace
}  // namespace lossk
