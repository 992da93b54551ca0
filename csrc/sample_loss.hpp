// Per-sample cross entropy of rows of logits, log1p-exact (see src/lossk/ops/sample_loss.py for the formula).
//
// Work per logit: 4 bytes read twice (the second time from cache, for rows that fit), one subtraction in float64 and one
// exponential of about 20 operations. Nothing is written but one float per row.
#pragma once
#include <cstdint>

namespace lossk {

constexpr std::int64_t kIgnored = -100;  // a target whose row is skipped: its loss is 0

struct LossArgs {
  const float* logits;          // [rows, classes], rows `stride` elements apart
  const std::int64_t* targets;  // [rows], in [0, classes), or kIgnored
  float* out;                   // [rows]
  std::int64_t stride;
  std::int64_t classes;  // >= 1
};

}  // namespace lossk
