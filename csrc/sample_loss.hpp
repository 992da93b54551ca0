// Per-sample cross entropy of rows of logits, log1p-exact (see src/lossk/ops/sample_loss.py for the formula).
//
// Work per logit: 4 bytes read once (rows longer than the scratch: twice), one subtraction and one exponential of about
// 25 operations in float32. Nothing is written but one float per row, and the slopes where they are wanted.
#pragma once
#include <cstdint>

namespace lossk {

constexpr std::int64_t kIgnored = -100;  // a target whose row is skipped: its loss is 0

struct LossArgs {
  const float* logits;          // [rows, classes], rows `stride` elements apart
  const std::int64_t* targets;  // [rows], in [0, classes), or kIgnored
  float* out;                   // [rows]
  float* slopes;                // [rows, classes] adjacent: slope_scale times d loss / d logit; or null: not wanted
  float slope_scale;
  std::int64_t stride;
  std::int64_t classes;  // >= 1
};

}  // namespace lossk
