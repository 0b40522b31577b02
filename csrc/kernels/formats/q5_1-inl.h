#pragma once

#include "base/block.h"

namespace nplora {

// An element with code q is d * q + m.
struct BlockQ5_1 {
  static constexpr size_t kElements = 32;
  static constexpr BlockFacts kFacts{.largest = kLargestHalf};
  Half d, m;
  uint8_t high[4];
  uint8_t q[16];
};
static_assert(sizeof(BlockQ5_1) == 24);

}  // namespace nplora

#ifdef NPLORA_ISA
namespace nplora::kernels::NPLORA_ISA {

template <>
struct Decoder<BlockQ5_1> {
  const BlockQ5_1& b;
  Vec<float> d = broadcast(b.d), m = broadcast(b.m);

  template <class To>
  void sub_block(size_t, To to) const {
    const Bytes q = load_bytes(b.q);
    const HighBits bits(b.high);
    put(widen(low_nibbles(q) | bits.low), d, m, to);
    put(widen(high_nibbles(q) | bits.high), d, m, to + kBytes);
  }
};

template <>
struct Codes<BlockQ5_1> : Unsigned {
  using Factors = One;
  static constexpr size_t kLargestCode = 31;
  const BlockQ5_1& block;
  TwoFloats both = two_floats(block);
  Factors a{both.first}, b{both.second};
  SubBlock sub_block(size_t) const { return nibbles(block.q) | high_bits(block.high); }
};

}  // namespace nplora::kernels::NPLORA_ISA
#endif
