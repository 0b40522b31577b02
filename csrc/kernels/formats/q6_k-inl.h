#pragma once

#include "base/block.h"

namespace nplora {

// A block has eight sub-blocks. An element with code q is d * scale * (q - 32), with one `scale` for each
// half of a sub-block. Half h of sub-block j has the scale scales[2 * j + h]. The codes have six bits. The
// low four bits of the codes of sub-block j are in the 32 bytes of `low` that start at byte
// 64 * (j / 4) + 32 * (j % 2). If j % 4 < 2, the low four bits are in the low nibbles of these bytes, else in
// the high nibbles. The high two bits of the codes of sub-block j are in the 32 bytes of `high` that start at
// byte 32 * (j / 4). The high two bits of a code start at bit 2 * (j % 4) of their byte.
struct BlockQ6_K {
  static constexpr size_t kElements = 256;
  static constexpr BlockFacts kFacts{.largest = 31 * 127 * kLargestHalf, .shorter = "q8_0"};
  uint8_t low[128];
  uint8_t high[64];
  int8_t scales[16];
  Half d;
};
static_assert(sizeof(BlockQ6_K) == 210);

}  // namespace nplora

#ifdef NPLORA_ISA
namespace nplora::kernels::NPLORA_ISA {

// The factor d * scale of each half of a sub-block.
template <>
struct Scales<BlockQ6_K> {
  alignas(64) float d[16];

  void read(const BlockQ6_K& block) {
    put(widen(load_bytes(block.scales)), broadcast(block.d), d);
    keep_in_memory(d);
  }
};

template <>
struct Decoder<BlockQ6_K> {
  const BlockQ6_K& b;
  Scales<BlockQ6_K> scales;

  explicit Decoder(const BlockQ6_K& block) : b(block) { scales.read(block); }

  template <class To>
  void sub_block(size_t j, To to) const {
    const size_t half = j / 4, t = j % 4;
    for (size_t i = 0; i < kSubBlock; i += kBytes) {
      const Bytes q = load_bytes(b.low + half * 64 + t % 2 * kSubBlock + i),
                  high = load_bytes(b.high + half * kSubBlock + i);
      const Bytes code = (t < 2 ? low_nibbles(q) : high_nibbles(q)) | move(high, 2 * t, 4, 48);
      put(widen(code - 32), Vec<float>::broadcast(scales.d[2 * j + i / kBytes]), to + i);
    }
  }
};

// Int8 products use the unsigned codes q. An element is factor * (q - 32) = factor * q + minimum, so the
// minimum is -32 * factor.
template <>
struct Codes<BlockQ6_K> : Unsigned {
  using Factors = EightSubBlocks;
  using Minima = HalfMinima;
  const BlockQ6_K& block;
  const Scales<BlockQ6_K>& scales;
  Halves a{scales.d, {}};
  Minima b = Minima::load(scales.d) * -32;
  SubBlock sub_block(size_t j) const {
    const size_t half = j / 4, t = j % 4;
    const SubBlock q = load_sub_block(block.low + half * 64 + t % 2 * kSubBlock);
    const SubBlock low = t < 2 ? q & 15 : move(q, 4, 0, 15);
    return low | move(load_sub_block(block.high + half * kSubBlock), 2 * t, 4, 48);
  }
};

}  // namespace nplora::kernels::NPLORA_ISA
#endif
