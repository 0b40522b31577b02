// Quantises to Q8_0 by ggml's rule, bit for bit.
#include <algorithm>
#include <cmath>

#include "ops/half.h"
#include "ops/quantizers/quantize.h"

namespace nplora {

namespace {

constexpr size_t kElements = BlockQ8_0::kElements;

// Rounds to the nearest integer, and away from zero in a tie.
int8_t rounded_away(float x) {
  const float whole = float(int(x)), rest = x - whole;
  return static_cast<int8_t>(whole + (rest >= 0.5f ? 1.0f : rest <= -0.5f ? -1.0f : 0.0f));
}

}  // namespace

template <>
void quantize_blocks(size_t blocks, const float* x, BlockQ8_0* out) {
  for (; blocks > 0; --blocks, x += kElements, ++out) {
    float absmax = 0;
    for (size_t i = 0; i < kElements; ++i) absmax = std::max(absmax, std::abs(x[i]));
    const float d = absmax / 127, inverse = 1 / d;
    out->d = to_half(d);
    // If 1 / d is infinite, d is so small that float16 rounds it to 0. The block then stores only zeros.
    for (size_t i = 0; i < kElements; ++i)
      out->q[i] = std::isinf(inverse) ? int8_t{0} : rounded_away(x[i] * inverse);
  }
}

}  // namespace nplora
