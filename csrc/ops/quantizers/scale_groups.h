// Formats whose blocks have a small integer for each group of values (ggml's K types). The scale of a group
// is the group's integer times a float16 number of the block. A group is a sub-block or half a sub-block.
// First a grid is fitted to each group separately. Then the quantiser repeats two steps: it chooses better
// integers near the current ones, and it fits the float16 number of the block to the chosen integers.
#pragma once

#include <algorithm>
#include <cmath>

#include "ops/half.h"
#include "ops/quantizers/code_grid.h"
#include "ops/quantizers/quantize.h"

namespace nplora {

inline constexpr int kRounds = 3;

// The float16 number that is about `largest` / largest_integer. A subnormal result is rounded up. Subnormal
// float16 numbers have few significant bits, so after rounding down, the result times largest_integer could
// be far below `largest`.
inline float unit_of(float largest, float largest_integer) {
  if (largest == 0) return 0;
  return round_to_half(std::min(largest / largest_integer, kLargestHalf) + kSmallestHalf / 2);
}

inline float ratio(float x, float unit) {
  return unit == 0 ? 0 : nearest_integer(x / unit);
}

}  // namespace nplora
