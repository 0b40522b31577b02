// Converts single numbers to and from float16, for the scales of low-bit blocks.
#pragma once

#include <bit>
#include <cstdint>

#include "base/block.h"
#include "kernels/kernel_table.h"

namespace nplora {

// Rounds x to the nearest float16 number. If two float16 numbers are equally near, the result is the one
// whose last bit is 0.
inline Half to_half(float x) {
  uint16_t bits;
  kernels::table().convert.narrow_float16(1, &x, &bits);
  return std::bit_cast<Half>(bits);
}

inline float to_float(Half half) {
  const auto bits = std::bit_cast<uint16_t>(half);
  float x;
  kernels::table().convert.widen_float16(1, &bits, &x);
  return x;
}

inline float round_to_half(float x) {
  return to_float(to_half(x));
}

}  // namespace nplora
