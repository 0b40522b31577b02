// What low-bit blocks consist of. A block may start at any byte.
#pragma once

#include <cstddef>
#include <cstdint>

namespace nplora {

// The values of a sub-block. Every block is a whole number of sub-blocks, and a row can be cut between them. A format may
// have a scale for each half of a sub-block.
inline constexpr size_t kSubBlock = 32;

// A float16, little-endian.
struct Half {
  uint8_t bytes[2];
};

// The smallest positive and the largest finite float16.
inline constexpr float kSmallestHalf = 0x1p-24f, kLargestHalf = 65504;

// What is known about a block format beside its layout.
struct BlockFacts {
  float largest;                  // the largest magnitude for which neither scale nor minimum exceeds float16
  const char* shorter = nullptr;  // what llama.cpp takes for rows that are not whole blocks
};

}  // namespace nplora
