#pragma once

#include "base/block.h"

namespace nplora {

// An element with code q is d * (q - 16).
struct BlockQ5_0 {
  static constexpr size_t kElements = 32;
  static constexpr BlockFacts kFacts{.largest = 16 * kLargestHalf};
  Half d;
  uint8_t high[4];
  uint8_t q[16];
};
static_assert(sizeof(BlockQ5_0) == 22);

}  // namespace nplora

#ifdef NPLORA_ISA
namespace nplora::kernels::NPLORA_ISA {

template <>
struct Decoder<BlockQ5_0> {
  const BlockQ5_0& b;
  Vec<float> d = broadcast(b.d);

  template <class To>
  void sub_block(size_t, To to) const {
    const Bytes q = load_bytes(b.q);
    const HighBits bits(b.high);
    put(widen((low_nibbles(q) | bits.low) - 16), widen((high_nibbles(q) | bits.high) - 16), d, to);
  }
};

template <>
struct Codes<BlockQ5_0> : Unsigned {
  using Factors = One;
  static constexpr size_t kLargestCode = 31;
  static constexpr float kOffset = 16;
  const BlockQ5_0& block;
  Factors a{to_float(block.d)}, b{-kOffset * a.v};
  SubBlock sub_block(size_t) const { return nibbles(block.q) | high_bits(block.high); }
};

}  // namespace nplora::kernels::NPLORA_ISA
#endif
