#include "ops/quantizers/affine_block.h"

namespace nplora {

template <>
void quantize_blocks(size_t blocks, const float* x, BlockQ2_K* out) {
  constexpr CodeRange kCodeRange{0, 3};
  for (; blocks > 0; --blocks, x += BlockQ2_K::kElements, ++out) {
    const auto b = best_affine<AffineBlock<16, 16, 15>>(x, kCodeRange);
    *out = {};
    out->d = to_half(b.d);
    out->dmin = to_half(b.dmin);
    for (size_t j = 0; j < b.kGroups; ++j) {
      out->scales[j] =
          static_cast<uint8_t>(static_cast<unsigned>(b.scale[j]) | static_cast<unsigned>(b.minimum[j]) << 4);
      const Encoder code(b.grid(j), kCodeRange);
      for (size_t i = 0; i < b.kSize; ++i) {
        const size_t at = j * b.kSize + i, sub_block = at / kSubBlock;
        uint8_t& codes = out->q[sub_block / 4 * kSubBlock + at % kSubBlock];
        codes = static_cast<uint8_t>(codes | static_cast<unsigned>(code(x[at])) << (sub_block % 4 * 2));
      }
    }
  }
}

}  // namespace nplora
