#include "ops/quantizers/affine_block.h"

namespace nplora {

template <>
void quantize_blocks(size_t blocks, const float* x, BlockQ4_K* out) {
  quantize_six_bits(blocks, x, out, {0, 15});
}

}  // namespace nplora
