// Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
//
// key = (seed, chain); counter = (block & 0xffffffff, block >> 32, step, stream); four words per counter.
// Inside one call only the low half of the block varies, so parts of the first three rounds are the same for every
// counter. PhiloxPlan holds them, together with the key schedule: 17.5 wide multiplies per counter remain of 20.
#pragma once
#include <cstdint>

namespace lossk {

constexpr std::uint32_t kPhiloxM0 = 0xD2511F53u;
constexpr std::uint32_t kPhiloxM1 = 0xCD9E8D57u;
constexpr std::uint32_t kPhiloxW0 = 0x9E3779B9u;
constexpr std::uint32_t kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

struct Stream {
  std::uint32_t seed;
  std::uint32_t chain;
  std::uint32_t step;
  std::uint32_t stream;
};

// One round maps (x0, x1, x2, x3) to (hi(M1 x2) ^ x1 ^ key0, lo(M1 x2), hi(M0 x0) ^ x3 ^ key1, lo(M0 x0)).
// The rounds over a varying low block number x are then
//   round 0: x2 = hi(M0 x) ^ round0_x2,  x3 = lo(M0 x);             x0, x1 are constant
//   round 1: x0 = hi(M1 x2) ^ round1_x0, x1 = lo(M1 x2), x2 = x3 ^ round1_x2;  x3 is constant
//   round 2: as written above, with the constant x3 folded into key1[2] (and x3 absent)
//   rounds 3..9: as written above.
struct PhiloxPlan {
  std::uint32_t round0_x2;
  std::uint32_t round1_x0;
  std::uint32_t round1_x2;
  std::uint32_t key0[kPhiloxRounds];
  std::uint32_t key1[kPhiloxRounds];
};

namespace {

inline std::uint32_t low_word(std::uint64_t product) { return static_cast<std::uint32_t>(product); }
inline std::uint32_t high_word(std::uint64_t product) { return static_cast<std::uint32_t>(product >> 32); }

inline PhiloxPlan make_plan(const Stream& s, std::uint32_t block_high) {
  PhiloxPlan plan{};
  for (int r = 0; r < kPhiloxRounds; ++r) {
    plan.key0[r] = s.seed + static_cast<std::uint32_t>(r) * kPhiloxW0;
    plan.key1[r] = s.chain + static_cast<std::uint32_t>(r) * kPhiloxW1;
  }
  const std::uint64_t from_step = std::uint64_t{kPhiloxM1} * s.step;
  const std::uint32_t x0 = high_word(from_step) ^ block_high ^ plan.key0[0];
  const std::uint64_t from_x0 = std::uint64_t{kPhiloxM0} * x0;
  plan.round0_x2 = s.stream ^ plan.key1[0];
  plan.round1_x0 = low_word(from_step) ^ plan.key0[1];
  plan.round1_x2 = high_word(from_x0) ^ plan.key1[1];
  plan.key1[2] ^= low_word(from_x0);
  return plan;
}

}  // namespace
}  // namespace lossk
