#pragma once

#include "base/block.h"

namespace nplora {

// Q5_K has the layout of Q4_K, with a fifth bit for each code. The fifth bit of element i of sub-block j is
// bit j of high[i].
struct BlockQ5_K {
  static constexpr size_t kElements = 256;
  static constexpr BlockFacts kFacts{.largest = 63 * kLargestHalf, .shorter = "q5_1"};
  Half d, dmin;
  uint8_t scales[12];
  uint8_t high[32];
  uint8_t q[128];
};
static_assert(sizeof(BlockQ5_K) == 176);

}  // namespace nplora

#ifdef NPLORA_ISA
namespace nplora::kernels::NPLORA_ISA {

template <>
struct Scales<BlockQ5_K> : SubScales<BlockQ5_K> {};

template <>
struct Decoder<BlockQ5_K> {
  const BlockQ5_K& b;
  Scales<BlockQ5_K> scales;

  explicit Decoder(const BlockQ5_K& block) : b(block) { scales.read(block); }

  template <class To>
  void sub_block(size_t j, To to) const {
    const Vec<float> d = scales.scale(j), m = scales.minus_min(j);
    for (size_t i = 0; i < kSubBlock; i += kBytes) {
      const Bytes q = load_bytes(b.q + j / 2 * kSubBlock + i), high = load_bytes(b.high + i);
      put(widen((j % 2 == 0 ? low_nibbles(q) : high_nibbles(q)) | move(high, j, 4, 16)), d, m, to + i);
    }
  }
};

template <>
struct Codes<BlockQ5_K> : Unsigned {
  using Factors = EightSubBlocks;
  const BlockQ5_K& block;
  const Scales<BlockQ5_K>& scales;
  Factors a = Factors::load(scales.d), b = Factors::load(scales.m_from_8 + 8);
  SubBlock sub_block(size_t j) const {
    const SubBlock q = load_sub_block(block.q + j / 2 * kSubBlock),
                   low = j % 2 == 0 ? q & 15 : move(q, 4, 0, 15);
    return low | move(load_sub_block(block.high), j, 4, 16);
  }
};

}  // namespace nplora::kernels::NPLORA_ISA
#endif
