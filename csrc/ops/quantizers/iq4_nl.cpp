#include <algorithm>
#include <cmath>

#include "ops/half.h"
#include "ops/quantizers/levels.h"
#include "ops/quantizers/quantize.h"

namespace nplora {

namespace {

constexpr size_t kElements = BlockIQ4_NL::kElements;
using Format = LevelCodes<kElements, kIQ4Levels>;

// Tries several starting scales: each maps the value of largest magnitude to a number near the first or the
// last level. With each starting scale, the values are rounded to codes, and then a new scale is fitted to
// these codes. Returns the scale with the smallest error.
float best_scale(const float* x) {
  constexpr int kSteps = 7;
  constexpr float kStep = 0.01f;
  const auto [low, high] = std::minmax_element(x, x + kElements);
  const float extreme = std::abs(*low) > std::abs(*high) ? *low : *high;
  float best = round_to_half(std::clamp(extreme / kIQ4Levels[15], -kLargestHalf, kLargestHalf));
  float error = Format::error(x, best);
  for (const float end : {float(kIQ4Levels[0]), float(kIQ4Levels[15])})
    for (int i = -kSteps; i <= kSteps; ++i) {
      const float start = extreme / (end * (1 + kStep * float(i)));
      const float d = round_to_half(fitted_scale(Format::sums(x, start), {start}).d);
      const float e = Format::error(x, d);
      if (e < error) {  // false if the new scale is infinite, because `e` is then infinite
        error = e;
        best = d;
      }
    }
  return best;
}

}  // namespace

template <>
void quantize_blocks(size_t blocks, const float* x, BlockIQ4_NL* out) {
  for (; blocks > 0; --blocks, x += kElements, ++out) {
    const float d = best_scale(x), scale = Format::inverse(d);
    out->d = to_half(d);
    for (size_t i = 0; i < kElements / 2; ++i)
      out->q[i] =
          static_cast<uint8_t>(Format::code(x[i] * scale) | Format::code(x[i + kElements / 2] * scale) << 4);
  }
}

}  // namespace nplora
