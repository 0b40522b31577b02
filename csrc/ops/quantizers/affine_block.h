// Formats with a scale and a minimum for each group of values. A value is (d * scale) * q - dmin * minimum,
// where q is its integer code, and d and dmin are float16 numbers of the block.
#pragma once

#include "ops/quantizers/scale_groups.h"

namespace nplora {

template <size_t kGroupCount, size_t kGroupSize, int kLargest>
struct AffineBlock {
  static constexpr size_t kGroups = kGroupCount, kSize = kGroupSize;
  static constexpr float kLargestScale = kLargest;  // the largest value of `scale` and of `minimum`
  float d = 0, dmin = 0;
  float scale[kGroups] = {}, minimum[kGroups] = {};
  double error = 0;

  CodeGrid grid(size_t j) const { return {d * scale[j], -(dmin * minimum[j])}; }
};

// Tries several grids d * q + m with m <= 0 for one group, and returns the best. The d and m of the result
// are not rounded to the storage format.
template <size_t n>
CodeGrid fit_group(const float* x, CodeRange codes) {
  const auto [least, most] = std::minmax_element(x, x + n);
  const float low = std::min(*least, 0.0f), range = *most - low;
  CodeGrid best{range / codes.last, low};
  float error = squared_error<n>(x, best, codes);
  for (int i = 0; i < kTries; ++i) {
    const CodeGrid start{range / (codes.last + codes_of_try(i)), low};
    const Moments s = moments<n>(x, start, codes);
    CodeGrid grid = fitted(s, start);
    if (grid.m > 0) grid = fitted_scale(s, start);
    const float e = squared_error<n>(x, grid, codes);
    if (e < error) {
      error = e;
      best = grid;
    }
  }
  return best;
}

// For each group, tries all pairs of an integer scale and an integer minimum that differ by at most one from
// the current ones, and chooses the pair with the smallest squared error.
template <class Affine>
void settle(const float* x, CodeRange codes, Affine& b) {
  b.error = 0;
  for (size_t j = 0; j < b.kGroups; ++j) {
    const float scale = b.scale[j], minimum = b.minimum[j];
    float error = INFINITY;
    for (float s = std::max(scale - 1, 0.0f); s <= std::min(scale + 1, Affine::kLargestScale); ++s)
      for (float m = std::max(minimum - 1, 0.0f); m <= std::min(minimum + 1, Affine::kLargestScale); ++m) {
        const float e = squared_error<Affine::kSize>(x + j * b.kSize, {b.d * s, -(b.dmin * m)}, codes);
        if (e < error) {
          error = e;
          b.scale[j] = s;
          b.minimum[j] = m;
        }
      }
    b.error += error;
  }
}

// Fits d and dmin to the codes, scales and minima of b by least squares. Returns false if there is no
// solution with d > 0 and dmin >= 0.
template <class Affine>
bool refit(const float* x, CodeRange codes, Affine& b) {
  // The sums of s * s, s * m, m * m, x * s and x * m over all values x of the block, where s = scale * q and
  // m = minimum.
  double ss = 0, sm = 0, mm = 0, xs = 0, xm = 0;
  for (size_t j = 0; j < b.kGroups; ++j) {
    const Moments k = moments<Affine::kSize>(x + j * b.kSize, b.grid(j), codes);
    ss += b.scale[j] * b.scale[j] * k.qq;
    sm += b.scale[j] * b.minimum[j] * k.q;
    mm += b.minimum[j] * b.minimum[j] * k.n;
    xs += b.scale[j] * k.xq;
    xm += b.minimum[j] * k.x;
  }
  const double determinant = ss * mm - sm * sm;
  if (!(determinant > 0)) return false;
  b.d = round_to_half(float((xs * mm - xm * sm) / determinant));
  b.dmin = round_to_half(float((xs * sm - xm * ss) / determinant));
  return b.d > 0 && b.dmin >= 0;
}

// Chooses d, dmin and the scale and minimum of each group for the values x of a block, with the search that
// scale_groups.h describes.
template <class Affine>
Affine best_affine(const float* x, CodeRange codes) {
  Affine best;
  CodeGrid fits[Affine::kGroups];
  float largest_d = 0, largest_m = 0;
  for (size_t j = 0; j < best.kGroups; ++j) {
    fits[j] = fit_group<Affine::kSize>(x + j * best.kSize, codes);
    largest_d = std::max(largest_d, fits[j].d);
    largest_m = std::max(largest_m, -fits[j].m);
  }
  best.d = unit_of(largest_d, Affine::kLargestScale);
  best.dmin = unit_of(largest_m, Affine::kLargestScale);
  for (size_t j = 0; j < best.kGroups; ++j) {
    best.scale[j] = std::clamp(ratio(fits[j].d, best.d), 0.0f, Affine::kLargestScale);
    best.minimum[j] = std::clamp(ratio(-fits[j].m, best.dmin), 0.0f, Affine::kLargestScale);
  }
  settle(x, codes, best);
  for (int i = 1; i < kRounds; ++i) {
    Affine other = best;
    if (!refit(x, codes, other)) break;
    settle(x, codes, other);
    if (!(other.error < best.error)) break;
    best = other;
  }
  return best;
}

// Quantises to Q4_K or Q5_K, whose scales and minima have six bits.
template <class Block>
void quantize_six_bits(size_t blocks, const float* x, Block* out, CodeRange codes) {
  for (; blocks > 0; --blocks, x += Block::kElements, ++out) {
    const auto b = best_affine<AffineBlock<8, 32, 63>>(x, codes);
    *out = {};
    out->d = to_half(b.d);
    out->dmin = to_half(b.dmin);
    for (size_t j = 0; j < b.kGroups; ++j) {
      const auto s = static_cast<unsigned>(b.scale[j]), m = static_cast<unsigned>(b.minimum[j]);
      const auto put = [&](size_t byte, unsigned bits) {
        out->scales[byte] = static_cast<uint8_t>(out->scales[byte] | bits);
      };
      if (j < 4) {
        put(j, s);
        put(j + 4, m);
      } else {
        put(j + 4, (s & 15) | (m & 15) << 4);
        put(j - 4, s >> 4 << 6);
        put(j, m >> 4 << 6);
      }
      const Encoder code(b.grid(j), codes);
      for (size_t i = 0; i < b.kSize; ++i) {
        const auto q = static_cast<unsigned>(code(x[j * b.kSize + i]));
        uint8_t& nibbles = out->q[j / 2 * b.kSize + i];
        nibbles = static_cast<uint8_t>(nibbles | (q & 15) << (j % 2 * 4));
        if constexpr (requires { out->high; })
          out->high[i] = static_cast<uint8_t>(out->high[i] | (q >> 4) << j);
      }
    }
  }
}

}  // namespace nplora
