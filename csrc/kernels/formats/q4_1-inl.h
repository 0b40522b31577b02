#pragma once

#include "base/block.h"

namespace nplora {

// An element with code q is d * q + m.
struct BlockQ4_1 {
  static constexpr size_t kElements = 32;
  static constexpr BlockFacts kFacts{.largest = kLargestHalf};
  Half d, m;
  uint8_t q[16];
};
static_assert(sizeof(BlockQ4_1) == 20);

}  // namespace nplora

#ifdef NPLORA_ISA
namespace nplora::kernels::NPLORA_ISA {

template <>
struct Decoder<BlockQ4_1> {
  const BlockQ4_1& b;
  Vec<float> d = broadcast(b.d), m = broadcast(b.m);

  template <class To>
  void sub_block(size_t, To to) const {
    const auto values = nibbles_for(to, Nibbles(d, m));
    const Bytes q = load_bytes(b.q);
    put(low(values, q), to);
    put(high(values, q), to + kBytes);
  }
};

template <>
struct Codes<BlockQ4_1> : Unsigned {
  using Factors = One;
  static constexpr size_t kLargestCode = 15;
  static constexpr bool kPlainNibbles = true;  // the codes are the nibbles of q
  const BlockQ4_1& block;
  TwoFloats both = two_floats(block);
  Factors a{both.first}, b{both.second};
  SubBlock sub_block(size_t) const { return nibbles(block.q); }
};

}  // namespace nplora::kernels::NPLORA_ISA
#endif
