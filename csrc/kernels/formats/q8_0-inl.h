#pragma once

#include "base/block.h"

namespace nplora {

// An element with code q is d * q.
struct BlockQ8_0 {
  static constexpr size_t kElements = 32;
  static constexpr BlockFacts kFacts{.largest = 127 * kLargestHalf};
  Half d;
  int8_t q[32];
};
static_assert(sizeof(BlockQ8_0) == 34);

}  // namespace nplora

#ifdef NPLORA_ISA
namespace nplora::kernels::NPLORA_ISA {

template <>
struct Decoder<BlockQ8_0> {
  const BlockQ8_0& b;
  Vec<float> d = broadcast(b.d);

  template <class To>
  void sub_block(size_t, To to) const {
    put(widen(load_bytes(b.q)), widen(load_bytes(b.q + kBytes)), d, to);
  }
};

template <>
struct Codes<BlockQ8_0> : EightBitCodes {
  using Factors = One;
  const BlockQ8_0& block;
  Factors a{to_float(block.d)}, b{-kOffset * a.v};
  SubBlock sub_block(size_t) const { return moved(load_sub_block(block.q)); }
};

}  // namespace nplora::kernels::NPLORA_ISA
#endif
