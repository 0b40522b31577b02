#pragma once

#include "base/block.h"
#include "kernels/formats/iq4_nl-inl.h"

namespace nplora {

// A block has eight sub-blocks. An element with code q is d * (scale - 32) * kIQ4Levels[q], with one 6-bit
// `scale` for each sub-block. Sub-block j starts at byte 16 * j of `q` and has the layout of IQ4_NL. The low
// four bits of the scale of sub-block j are in byte j / 2 of `scales_low`: in the low nibble if j is even,
// else in the high nibble. The high two bits of the scale of sub-block j are bits 2 * j and 2 * j + 1 of the
// 16-bit number `scales_high`.
struct BlockIQ4_XS {
  static constexpr size_t kElements = 256;
  static constexpr BlockFacts kFacts{.largest = 31 * 113 * kLargestHalf, .shorter = "iq4_nl"};
  Half d;
  uint8_t scales_high[2];
  uint8_t scales_low[4];
  uint8_t q[128];
};
static_assert(sizeof(BlockIQ4_XS) == 136);

}  // namespace nplora

#ifdef NPLORA_ISA
namespace nplora::kernels::NPLORA_ISA {

// The factors d * (scale - 32) of the eight sub-blocks are the first eight elements of the array `d`. The
// other elements are not used.
template <>
struct Scales<BlockIQ4_XS> {
  alignas(64) float d[16];

  void read(const BlockIQ4_XS& block);
};
inline void Scales<BlockIQ4_XS>::read(const BlockIQ4_XS& block) {
  uint32_t low;
  __builtin_memcpy(&low, block.scales_low, sizeof low);
  // Moves the eight 2-bit fields of `scales_high` to eight bytes. After the first line, each 32-bit half of
  // `high` holds four fields. After the second line, each 16-bit quarter holds two fields, and after the
  // third line, each byte holds one field.
  uint64_t high = block.scales_high[0] | uint64_t(block.scales_high[1]) << 32;
  high = (high | high << 12) & 0x000F000F000F000F;
  high = (high | high << 6) & 0x0303030303030303;
  const Bytes nibbles = pair(low, 0);
  const Bytes codes = interleave(low_nibbles(nibbles), high_nibbles(nibbles)).low | pair(high << 4, 0);
  put(widen(codes - 32), broadcast(block.d), d);
  keep_in_memory(d);
}

template <>
struct Decoder<BlockIQ4_XS> {
  const BlockIQ4_XS& b;
  Scales<BlockIQ4_XS> scales;

  explicit Decoder(const BlockIQ4_XS& block) : b(block) { scales.read(block); }

  template <class To>
  void sub_block(size_t j, To to) const {
    put_iq4(b.q + j * kBytes, Vec<float>::broadcast(scales.d[j]), to);
  }
};

template <>
struct Codes<BlockIQ4_XS> : IQ4Codes {
  using Factors = EightSubBlocks;
  const BlockIQ4_XS& block;
  const Scales<BlockIQ4_XS>& scales;
  Factors a = Factors::load(scales.d), b{a.v * -kOffset};
  SubBlock sub_block(size_t j) const { return levels_of(block.q + j * kBytes); }
};

}  // namespace nplora::kernels::NPLORA_ISA
#endif
