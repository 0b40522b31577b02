#pragma once

#include "base/block.h"

namespace nplora {

// The levels of IQ4_NL and IQ4_XS: code q stands for kIQ4Levels[q].
inline constexpr int8_t kIQ4Levels[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                          1,    13,   25,  38,  53,  69,  89,  113};

// An element with code q is d * kIQ4Levels[q].
struct BlockIQ4_NL {
  static constexpr size_t kElements = 32;
  static constexpr BlockFacts kFacts{.largest = 113 * kLargestHalf};
  Half d;
  uint8_t q[16];
};
static_assert(sizeof(BlockIQ4_NL) == 18);

}  // namespace nplora

#ifdef NPLORA_ISA
namespace nplora::kernels::NPLORA_ISA {

// A copy of the levels, as floats and as bytes. The copy is in the namespace of the kernel unit, because
// kernel units share no inline code (see vec.h).
struct IQ4Levels {
  float floats[16];
  int8_t bytes[16];

  Bytes as_bytes() const { return load_bytes(bytes); }
};
inline constexpr IQ4Levels kIQ4 = [] {
  IQ4Levels levels{};
  for (size_t i = 0; i < 16; ++i) levels.floats[i] = levels.bytes[i] = kIQ4Levels[i];
  return levels;
}();

// In int8 products, each code is replaced by its level, which is a number of eight bits.
struct IQ4Codes : EightBitCodes {
  static SubBlock levels_of(const uint8_t* q) { return lookup(moved(kIQ4.as_bytes()), nibbles(q)); }
};

// Decodes 32 codes, which are the nibbles of 16 bytes. The decoded value of a code is `d` times the level of
// the code.
template <class To>
inline void put_iq4(const uint8_t* codes, Vec<float> d, To to) {
  const Bytes q = load_bytes(codes);
#if defined(NPLORA_SIMD_AVX512)
  const Levels levels(kIQ4.floats);
  put(lookup(levels, low_nibbles(q)), lookup(levels, high_nibbles(q)), d, to);
#else
  const Bytes levels = kIQ4.as_bytes();
  put(widen(lookup(levels, low_nibbles(q))), widen(lookup(levels, high_nibbles(q))), d, to);
#endif
}

template <>
struct Decoder<BlockIQ4_NL> {
  const BlockIQ4_NL& b;
  Vec<float> d = broadcast(b.d);

  template <class To>
  void sub_block(size_t, To to) const {
    put_iq4(b.q, d, to);
  }
};

template <>
struct Codes<BlockIQ4_NL> : IQ4Codes {
  using Factors = One;
  const BlockIQ4_NL& block;
  Factors a{to_float(block.d)}, b{-kOffset * a.v};
  SubBlock sub_block(size_t) const { return levels_of(block.q); }
};

}  // namespace nplora::kernels::NPLORA_ISA
#endif
