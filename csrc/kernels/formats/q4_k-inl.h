#pragma once

#include "base/block.h"

namespace nplora {

// A block has eight sub-blocks. An element of sub-block j with code q is d * scale_j * q - dmin * min_j. The
// scales and minima have six bits each and are packed into the 12 bytes `scales`. For j < 4, scale_j is the
// low six bits of byte j, and min_j is the low six bits of byte 4 + j. For j >= 4, the low four bits of
// scale_j are the low nibble of byte 4 + j, and the low four bits of min_j are the high nibble of byte 4 + j.
// The high two bits of scale_j are the high two bits of byte j - 4, and the high two bits of min_j are the
// high two bits of byte j. For even j, the codes of sub-blocks j and j + 1 are in the 32 bytes of `q` that
// start at byte 16 * j. The low nibbles of these bytes belong to sub-block j, and the high nibbles belong to
// sub-block j + 1.
struct BlockQ4_K {
  static constexpr size_t kElements = 256;
  static constexpr BlockFacts kFacts{.largest = 63 * kLargestHalf, .shorter = "q5_0"};
  Half d, dmin;
  uint8_t scales[12];
  uint8_t q[128];
};
static_assert(sizeof(BlockQ4_K) == 144);

}  // namespace nplora

#ifdef NPLORA_ISA
namespace nplora::kernels::NPLORA_ISA {

template <>
struct Scales<BlockQ4_K> : SubScales<BlockQ4_K> {};

template <>
struct Decoder<BlockQ4_K> {
  const BlockQ4_K& b;
  Scales<BlockQ4_K> scales;

  explicit Decoder(const BlockQ4_K& block) : b(block) { scales.read(block); }

  template <class To>
  void sub_block(size_t j, To to) const {
    const auto values = nibbles_for(to, Nibbles(scales.scale(j), scales.minus_min(j)));
    for (size_t i = 0; i < kSubBlock; i += kBytes) {
      const Bytes q = load_bytes(b.q + j / 2 * kSubBlock + i);
      put(j % 2 == 0 ? low(values, q) : high(values, q), to + i);
    }
  }
};

template <>
struct Codes<BlockQ4_K> : Unsigned {
  using Factors = EightSubBlocks;
  const BlockQ4_K& block;
  const Scales<BlockQ4_K>& scales;
  Factors a = Factors::load(scales.d), b = Factors::load(scales.m_from_8 + 8);
  SubBlock sub_block(size_t j) const {
    const SubBlock q = load_sub_block(block.q + j / 2 * kSubBlock);
    return j % 2 == 0 ? q & 15 : move(q, 4, 0, 15);
  }
};

}  // namespace nplora::kernels::NPLORA_ISA
#endif
