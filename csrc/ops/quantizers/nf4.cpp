// Quantises to NF4 as bitsandbytes does (Dettmers et al. 2023). Each value is divided by the largest
// magnitude of its block (absmax) and rounded to the nearest of 16 levels. The absmax values can be quantised
// in the same way, with other levels.
#include <algorithm>
#include <cmath>

#include "ops/quantizers/quantize.h"

namespace nplora {

namespace {

// A smaller absmax is replaced by this number, so that 1 / absmax is finite.
constexpr float kSmallestAbsmax = 1e-38f;

float absmax_of(size_t n, const float* x) {
  float absmax = 0;
  for (size_t i = 0; i < n; ++i) absmax = std::max(absmax, std::abs(x[i]));
  return absmax;
}

float inverse_of(float absmax) {
  return 1 / std::max(absmax, kSmallestAbsmax);
}

// Returns the code of the level nearest to x, or of the lower level if two levels are equally near. A level's
// code is its index, so the function counts the midpoints (between neighbouring levels) that are below x.
uint8_t nearest_level(float x) {
  int middles = 0;
  for (size_t i = 0; i < 15; ++i) middles += x > (kNf4Levels[i] + kNf4Levels[i + 1]) / 2;
  return static_cast<uint8_t>(middles);
}

}  // namespace

float quantize_nf4_block(size_t n, const float* x, uint8_t* codes) {
  const float absmax = absmax_of(n, x), inverse = inverse_of(absmax);
  uint8_t q[BlockNf4::kElements + 1];
  for (size_t i = 0; i < n; ++i) q[i] = nearest_level(x[i] * inverse);
  q[n] = nearest_level(0);  // if n is odd, this code fills the last byte
  for (size_t i = 0; i < n; i += 2) codes[i / 2] = static_cast<uint8_t>(q[i] << 4 | q[i + 1]);
  return absmax;
}

// The dynamic code book of Dettmers 2016. For each of seven decimal exponents, numbered i = 0 to 6, the range
// from 0.1 to 1 is cut into 2^i equal parts. The book contains the midpoints of these parts, times 10^(i -
// 6), with both signs, and also 0 and 1.
void dynamic_book(float (&book)[kNf4Book]) {
  constexpr int kExponents = 7;
  float* end = book;
  for (int i = 0; i < kExponents; ++i) {
    const int parts = 1 << i;
    const float step = (1.0f - 0.1f) / float(parts), unit = float(std::pow(10.0, i - kExponents + 1));
    // bound(k) is where part k begins. Like torch.linspace, `bound` starts from the nearer end of the range
    // (0.1 or 1) and uses a fused multiply-add.
    const auto bound = [&](int k) {
      return k < (parts + 1) / 2 ? std::fma(step, float(k), 0.1f) : std::fma(-step, float(parts - k), 1.0f);
    };
    for (int k = 0; k < parts; ++k) {
      const float middle = unit * ((bound(k) + bound(k + 1)) / 2);
      *end++ = middle;
      *end++ = -middle;
    }
  }
  *end++ = 0;
  *end++ = 1;
  std::sort(book, end);
}

float quantize_nf4_group(size_t n, const float* x, const float (&book)[kNf4Book], uint8_t* codes) {
  float middles[kNf4Book - 1];
  for (size_t i = 0; i + 1 < kNf4Book; ++i) middles[i] = (book[i] + book[i + 1]) / 2;
  const float scale = absmax_of(n, x), inverse = inverse_of(scale);
  for (size_t i = 0; i < n; ++i)
    codes[i] =
        static_cast<uint8_t>(std::lower_bound(middles, middles + kNf4Book - 1, x[i] * inverse) - middles);
  return scale;
}

}  // namespace nplora
