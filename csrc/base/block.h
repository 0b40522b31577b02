// What low-bit blocks consist of. A block may start at any byte.
#pragma once

#include <cstddef>
#include <cstdint>

namespace nplora {

// Every block is a whole number of strips: the pieces in which a row can be cut.
inline constexpr size_t kStrip = 32;

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
