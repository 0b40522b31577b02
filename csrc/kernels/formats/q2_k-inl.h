#pragma once

#include "base/block.h"

namespace nplora {

// A block has eight sub-blocks. Byte 2 * j + h of `scales` belongs to half h of sub-block j: the low nibble
// is the scale of this half, and the high nibble is the minimum of this half. An element with code q is
// d * scale * q - dmin * minimum. The 2-bit codes of sub-block j are in the 32 bytes of `q` that start at
// byte 32 * (j / 4). Each code starts at bit 2 * (j % 4) of its byte.
struct BlockQ2_K {
  static constexpr size_t kElements = 256;
  static constexpr BlockFacts kFacts{.largest = 15 * kLargestHalf, .shorter = "iq4_nl"};
  uint8_t scales[16];
  uint8_t q[64];
  Half d, dmin;
};
static_assert(sizeof(BlockQ2_K) == 84);

}  // namespace nplora

#ifdef NPLORA_ISA
namespace nplora::kernels::NPLORA_ISA {

// The factor d * scale and the negated minimum -dmin * minimum of each half of a sub-block.
template <>
struct Scales<BlockQ2_K> {
  alignas(64) float d[16], m[16];

  void read(const BlockQ2_K& block) {
    const Bytes codes = load_bytes(block.scales);
    put(widen(low_nibbles(codes)), broadcast(block.d), d);
    put(widen(high_nibbles(codes)), broadcast(negative(block.dmin)), m);
    keep_in_memory(d);
    keep_in_memory(m);
  }
};

template <>
struct Decoder<BlockQ2_K> {
  const BlockQ2_K& b;
  Scales<BlockQ2_K> scales;

  explicit Decoder(const BlockQ2_K& block) : b(block) { scales.read(block); }

  template <class To>
  void sub_block(size_t j, To to) const {
    for (size_t i = 0; i < kSubBlock; i += kBytes) {
      const Bytes q = load_bytes(b.q + j / 4 * kSubBlock + i);
      const size_t half = 2 * j + i / kBytes;
      const auto d = Vec<float>::broadcast(scales.d[half]), m = Vec<float>::broadcast(scales.m[half]);
#if defined(NPLORA_SIMD_AVX512)
      // The permutation uses four bits of each index in `at`. The lower two bits are the code of the element,
      // and the upper two bits belong to the code of another element. `values` repeats the values of the four
      // codes four times, so the upper two bits do not change the result.
      const __m512 codes = _mm512_broadcast_f32x4(_mm_setr_ps(0, 1, 2, 3));
      const __m512 values = _mm512_fmadd_ps(codes, d.v, m.v);
      const Indices at = indices(q) >> (j % 4 * 2);
      put(permuted(values, at), to + i);
#else
      put(widen(move(q, j % 4 * 2, 0, 3)), d, m, to + i);
#endif
    }
  }
};

template <>
struct Codes<BlockQ2_K> : Unsigned {
  using Factors = EightSubBlocks;
  using Minima = HalfMinima;
  const BlockQ2_K& block;
  const Scales<BlockQ2_K>& scales;
  Halves a{scales.d, {}};
  Minima b = Minima::load(scales.m);
  SubBlock sub_block(size_t j) const {
    return move(load_sub_block(block.q + j / 4 * kSubBlock), j % 4 * 2, 0, 3);
  }
};

}  // namespace nplora::kernels::NPLORA_ISA
#endif
