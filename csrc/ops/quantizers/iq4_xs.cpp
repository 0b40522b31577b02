#include "ops/quantizers/levels.h"
#include "ops/quantizers/scaled_block.h"

namespace nplora {

namespace {

struct Format : LevelCodes<kSubBlock, kIQ4Levels> {
  static constexpr size_t kGroups = 8;
  static constexpr float kLeastScale = -32, kMostScale = 31;
};

ScaledBlock<Format> best_block(const float* x) {
  const float unit = unit_of(absmax(BlockIQ4_XS::kElements, x) / kIQ4Levels[15], Format::kMostScale);
  return best_of_starts<Format>(x, unit, -kIQ4Levels[0], 4);
}

}  // namespace

template <>
void quantize_blocks(size_t blocks, const float* x, BlockIQ4_XS* out) {
  for (; blocks > 0; --blocks, x += BlockIQ4_XS::kElements, ++out) {
    const ScaledBlock<Format> b = best_block(x);
    *out = {};
    out->d = to_half(b.d);
    for (size_t j = 0; j < b.kGroups; ++j) {
      const auto scale = static_cast<unsigned>(b.scale[j] - Format::kLeastScale);
      uint8_t &low = out->scales_low[j / 2], &high = out->scales_high[j / 4];
      low = static_cast<uint8_t>(low | (scale & 15) << (j % 2 * 4));
      high = static_cast<uint8_t>(high | (scale >> 4) << (j % 4 * 2));
      const float inverse = Format::inverse(b.d * b.scale[j]);
      for (size_t i = 0; i < kSubBlock; ++i) {
        uint8_t& codes = out->q[j * kSubBlock / 2 + i % (kSubBlock / 2)];
        codes = static_cast<uint8_t>(codes | Format::code(x[j * kSubBlock + i] * inverse)
                                                 << (i / (kSubBlock / 2) * 4));
      }
    }
  }
}

}  // namespace nplora
