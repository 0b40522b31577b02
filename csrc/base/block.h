// Types and constants that all formats of low-bit blocks share. A block need not be aligned: it may start at
// any byte.
#pragma once

#include <cstddef>
#include <cstdint>

namespace nplora {

// The number of values in a sub-block. A block consists of whole sub-blocks. Code that processes a row of
// blocks in parts may cut the row between any two sub-blocks. Some formats have a scale for each half of a
// sub-block.
inline constexpr size_t kSubBlock = 32;

// A float16, little-endian.
struct Half {
  uint8_t bytes[2];
};

// The smallest positive and the largest finite float16.
inline constexpr float kSmallestHalf = 0x1p-24f, kLargestHalf = 65504;

// Properties of a block format, apart from its layout.
struct BlockFacts {
  // The largest magnitude that a value may have. If a block had a larger value, its scale or its minimum
  // would be too large for float16. (In NF4, scales are floats, so the limit is the range of float.)
  float largest;
  // If the length of a row is not a multiple of the block size of this format, the row is stored in the
  // format `shorter` instead, as in llama.cpp.
  const char* shorter = nullptr;
};

}  // namespace nplora
