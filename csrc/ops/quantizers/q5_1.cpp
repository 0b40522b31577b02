#include "ops/quantizers/blocks_of_32.h"

namespace nplora {

template <>
void quantize_blocks(size_t blocks, const float* x, BlockQ5_1* out) {
  blocks_of_32::quantize_affine(blocks, x, out, 31);
}

}  // namespace nplora
