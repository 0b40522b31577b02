#include "ops/quantizers/scaled_block.h"

namespace nplora {

namespace {

struct Format : IntegerCodes<16, -4, 3> {
  static constexpr size_t kGroups = 16;
  static constexpr float kLeastScale = -32, kMostScale = 31;
};

ScaledBlock<Format> best_block(const float* x) {
  const float unit = unit_of(absmax(BlockQ3_K::kElements, x) / Format::kCodeRange.last, Format::kMostScale);
  return best_of_starts<Format>(x, unit, -Format::kCodeRange.first, 8);
}

}  // namespace

template <>
void quantize_blocks(size_t blocks, const float* x, BlockQ3_K* out) {
  for (; blocks > 0; --blocks, x += BlockQ3_K::kElements, ++out) {
    const ScaledBlock<Format> b = best_block(x);
    *out = {};
    out->d = to_half(b.d);
    for (size_t j = 0; j < b.kGroups; ++j) {
      const auto scale = static_cast<unsigned>(b.scale[j] - Format::kLeastScale);
      uint8_t &low = out->scales[j % 8], &high = out->scales[8 + j % 4];
      low = static_cast<uint8_t>(low | (scale & 15) << (j / 8 * 4));
      high = static_cast<uint8_t>(high | (scale >> 4) << (j / 4 * 2));
      const Encoder code({b.d * b.scale[j]}, Format::kCodeRange);
      for (size_t i = 0; i < b.kSize; ++i) {
        const size_t at = j * b.kSize + i, half = at / 128, sub_block = at / kSubBlock, l = at % kSubBlock;
        const auto q = static_cast<unsigned>(code(x[at]) - Format::kCodeRange.first);
        uint8_t &low_bits = out->low[half * kSubBlock + l], &high_bit = out->high[l];
        low_bits = static_cast<uint8_t>(low_bits | (q & 3) << (sub_block % 4 * 2));
        high_bit = static_cast<uint8_t>(high_bit | (q >> 2) << sub_block);
      }
    }
  }
}

}  // namespace nplora
