#pragma once

#include "base/block.h"

namespace nplora {

// A block has eight sub-blocks. An element with the 3-bit code q is d * (scale - 32) * (q - 4), with one
// 6-bit `scale` for each half of a sub-block. Half h of sub-block j has scale number 2 * j + h. The low two
// bits of the codes of sub-block j are in the 32 bytes of `low` that start at byte 32 * (j / 4). The low two
// bits of a code start at bit 2 * (j % 4) of their byte. The highest bit of the code of element i of
// sub-block j is bit j of high[i]. The low four bits of scale number i are in byte i % 8 of `scales`: in the
// low nibble if i < 8, else in the high nibble. The high two bits of scale number i start at bit 2 * (i / 4)
// of byte 8 + i % 4 of `scales`.
struct BlockQ3_K {
  static constexpr size_t kElements = 256;
  static constexpr BlockFacts kFacts{.largest = 31 * 3 * kLargestHalf, .shorter = "iq4_nl"};
  uint8_t high[32];
  uint8_t low[64];
  uint8_t scales[12];
  Half d;
};
static_assert(sizeof(BlockQ3_K) == 110);

}  // namespace nplora

#ifdef NPLORA_ISA
namespace nplora::kernels::NPLORA_ISA {

// Stores the 16 factors d * (scale - 32) of a block in `to`.
inline void put_scales(const BlockQ3_K& block, float* to) {
  constexpr uint64_t kFour = 0x0F0F0F0F0F0F0F0F, kTwo = 0x3030303030303030;
  uint64_t low;
  uint32_t high;
  __builtin_memcpy(&low, block.scales, sizeof low);
  __builtin_memcpy(&high, block.scales + sizeof low, sizeof high);
  // Moves the high two bits of each scale to bits 4 and 5 of a separate byte.
  const uint64_t first = uint64_t(high) << 4 | uint64_t(high) << 34, second = high | uint64_t(high >> 2)
                                                                                         << 32;
  const Bytes codes = pair((low & kFour) | (first & kTwo), (low >> 4 & kFour) | (second & kTwo));
  put(widen(codes - 32), broadcast(block.d), to);
}

template <>
struct Scales<BlockQ3_K> {
  alignas(64) float d[16];

  void read(const BlockQ3_K& block) {
    put_scales(block, d);
    keep_in_memory(d);
  }
};

template <>
struct Decoder<BlockQ3_K> {
  const BlockQ3_K& b;
  Scales<BlockQ3_K> scales;

  explicit Decoder(const BlockQ3_K& block) : b(block) { scales.read(block); }

  template <class To>
  void sub_block(size_t j, To to) const {
    for (size_t i = 0; i < kSubBlock; i += kBytes) {
      const Bytes q = load_bytes(b.low + j / 4 * kSubBlock + i), high = load_bytes(b.high + i);
      const auto d = Vec<float>::broadcast(scales.d[2 * j + i / kBytes]);
#if defined(NPLORA_SIMD_AVX512)
      // The permutation uses four bits of each index. The lower three bits are the code of the element, and
      // the highest bit belongs to the code of another element. The table `codes` holds the values -4 to 3
      // twice, so the highest bit does not change the result.
      const __m512 codes = _mm512_setr_ps(-4, -3, -2, -1, 0, 1, 2, 3, -4, -3, -2, -1, 0, 1, 2, 3);
      const Indices low_bits = indices(q) >> (j % 4 * 2), bits = indices(high),
                    high_bit = j < 2 ? bits << (2 - j) : bits >> (j - 2);
      put(permuted(codes, (low_bits & ~4u) | (high_bit & 4u)), d, to + i);
#else
      const Bytes code = move(q, j % 4 * 2, 0, 3) | move(high, j, 2, 4);
      put(widen(code - 4), d, to + i);
#endif
    }
  }
};

// Int8 products use the unsigned codes q. An element is factor * (q - 4) = factor * q + minimum, so the
// minimum is -4 * factor.
template <>
struct Codes<BlockQ3_K> : Unsigned {
  using Factors = EightSubBlocks;
  using Minima = HalfMinima;
  const BlockQ3_K& block;
  const Scales<BlockQ3_K>& scales;
  Halves a{scales.d, {}};
  Minima b = Minima::load(scales.d) * -4;
  SubBlock sub_block(size_t j) const {
    const SubBlock q = load_sub_block(block.low + j / 4 * kSubBlock);
    return move(q, j % 4 * 2, 0, 3) | move(load_sub_block(block.high), j, 2, 4);
  }
};

}  // namespace nplora::kernels::NPLORA_ISA
#endif
