// Formats with a float16 scale of small integers, each of which scales a group of values (ggml's K types): a sub-block, or half
// of one. A grid is fitted to every group alone; then the integers near it are tried, and the float16 is fitted to what they
// chose, in turns.
#pragma once

#include <algorithm>
#include <cmath>

#include "ops/half.h"
#include "ops/quantizers/code_grid.h"
#include "ops/quantizers/quantize.h"

namespace nplora {

inline constexpr int kRounds = 3;

// The float16 of which `largest` is the largest integer's multiple. Subnormal ones are few: there it is rounded up, lest the multiple
// falls far short.
inline float unit_of(float largest, float largest_integer) {
  if (largest == 0) return 0;
  return round_to_half(std::min(largest / largest_integer, kLargestHalf) + kSmallestHalf / 2);
}

inline float ratio(float x, float unit) {
  return unit == 0 ? 0 : nearest_integer(x / unit);
}

}  // namespace nplora
