#pragma once

#include "base/block.h"

namespace nplora {

// Sixteen sub-blocks of 16: (d scale) (q - 32). Strip 4 h + t has its low four bits at 64 h + 32 (t % 2) of low, in the low nibbles
// for t < 2, else in the high ones; its high two at 32 h of high, at bit 2 t.
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

template <>
struct Decoder<BlockQ6_K> {
  const BlockQ6_K& b;
  float scales[16];

  explicit Decoder(const BlockQ6_K& block) : b(block) {
    put(widen(load_bytes(b.scales)), broadcast(b.d), scales);
    keep_in_memory(scales);
  }

  template <class To>
  void strip(size_t j, To to) const {
    const size_t half = j / 4, t = j % 4;
    for (size_t i = 0; i < kStrip; i += kBytes) {
      const Bytes q = load_bytes(b.low + half * 64 + t % 2 * kStrip + i),
                  high = load_bytes(b.high + half * kStrip + i);
      const Bytes code = (t < 2 ? low_nibbles(q) : high_nibbles(q)) | move(high, 2 * t, 4, 48);
      put(widen(code - 32), Vec<float>::broadcast(scales[2 * j + i / kBytes]), to + i);
    }
  }
};

template <>
struct Codes<BlockQ6_K> : Signed {
  using Factors = EightStrips;
  const BlockQ6_K& block;
  Halves a = scales_of(block);
  Strip strip(size_t j) const {
    const size_t half = j / 4, t = j % 4;
    const Strip q = load_strip(block.low + half * 64 + t % 2 * kStrip);
    const Strip low = t < 2 ? q & 15 : move(q, 4, 0, 15);
    return (low | move(load_strip(block.high + half * kStrip), 2 * t, 4, 48)) - 32;
  }
  static Halves scales_of(const BlockQ6_K& block) {
    float scales[16];
    put(widen(load_bytes(block.scales)), Vec<float>::broadcast(to_float(block.d)), scales);
    return halves(scales);
  }
};

}  // namespace nplora::kernels::NPLORA_ISA
#endif
