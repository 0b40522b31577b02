#include "ops/quantizers/blocks_of_32.h"

namespace nplora {

template <>
void quantize_blocks(size_t blocks, const float* x, BlockQ5_0* out) {
  blocks_of_32::quantize_scale(blocks, x, out, 16);
}

}  // namespace nplora
