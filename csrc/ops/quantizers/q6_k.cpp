#include "ops/quantizers/scaled_block.h"

namespace nplora {

namespace {

struct Format : IntegerCodes<16, -32, 31> {
  static constexpr size_t kGroups = 16;
  static constexpr float kLeastScale = -128, kMostScale = 127;
};

ScaledBlock<Format> best_block(const float* x) {
  // The first scale of a group turns the largest magnitude of the group into a code of magnitude 32. The
  // search tries all scales that differ by at most 8 from the first scale or from its negative, limited to
  // the range from kLeastScale to kMostScale. In the group with the largest magnitude of the block, the first
  // scale is about 127 * 31 / 32 = 123. The search then tries scales from 115 to 127. Before clipping, they
  // turn the largest magnitude into codes of magnitude 34 to 31. The scales from -115 to -128 are tried too.
  constexpr int kReach = 8;
  ScaledBlock<Format> best;
  best.d = unit_of(absmax(BlockQ6_K::kElements, x) / Format::kCodeRange.last, Format::kMostScale);
  for (size_t j = 0; j < best.kGroups; ++j) {
    const float scale = ratio(absmax(best.kSize, x + j * best.kSize) / -Format::kCodeRange.first, best.d);
    best.settle(x, j, {scale, -scale}, kReach);
  }
  return refined(x, best);
}

}  // namespace

template <>
void quantize_blocks(size_t blocks, const float* x, BlockQ6_K* out) {
  for (; blocks > 0; --blocks, x += BlockQ6_K::kElements, ++out) {
    const ScaledBlock<Format> b = best_block(x);
    *out = {};
    out->d = to_half(b.d);
    for (size_t j = 0; j < b.kGroups; ++j) {
      out->scales[j] = static_cast<int8_t>(b.scale[j]);
      const Encoder code({b.d * b.scale[j]}, Format::kCodeRange);
      for (size_t i = 0; i < b.kSize; ++i) {
        const size_t at = j * b.kSize + i, half = at / 128, sub_block = at % 128 / kSubBlock,
                     l = at % kSubBlock;
        const auto q = static_cast<unsigned>(code(x[at]) - Format::kCodeRange.first);
        uint8_t &low = out->low[64 * half + sub_block % 2 * kSubBlock + l],
                &high = out->high[half * kSubBlock + l];
        low = static_cast<uint8_t>(low | (q & 15) << (sub_block / 2 * 4));
        high = static_cast<uint8_t>(high | (q >> 4) << (2 * sub_block));
      }
    }
  }
}

}  // namespace nplora
