#pragma once

#include "base/block.h"

namespace nplora {

// An element with code q is d * (q - 8).
struct BlockQ4_0 {
  static constexpr size_t kElements = 32;
  static constexpr BlockFacts kFacts{.largest = 8 * kLargestHalf};
  Half d;
  uint8_t q[16];
};
static_assert(sizeof(BlockQ4_0) == 18);

}  // namespace nplora

#ifdef NPLORA_ISA
namespace nplora::kernels::NPLORA_ISA {

template <>
struct Decoder<BlockQ4_0> {
  const BlockQ4_0& b;
  Vec<float> d = broadcast(b.d);

  template <class To>
  void sub_block(size_t, To to) const {
    const auto values = nibbles_for(to, Nibbles(8, d));
    const Bytes q = load_bytes(b.q);
    put(low(values, q), to);
    put(high(values, q), to + kBytes);
  }
};

template <>
struct Codes<BlockQ4_0> : Unsigned {
  using Factors = One;
  static constexpr size_t kLargestCode = 15;
  static constexpr bool kPlainNibbles = true;  // the codes are the nibbles of q
  static constexpr float kOffset = 8;
  const BlockQ4_0& block;
  Factors a{to_float(block.d)}, b{-kOffset * a.v};
  SubBlock sub_block(size_t) const { return nibbles(block.q); }
};

}  // namespace nplora::kernels::NPLORA_ISA
#endif
