// The formats with blocks of 256 (ggml's K types): a float16 scale of small integers, each of which scales a sub-block. A grid is
// fitted to every sub-block alone; then the integers near it are tried, and the float16 is fitted to what they chose, in turns.
#include <algorithm>
#include <cmath>
#include <initializer_list>

#include "ops/code_grid.h"
#include "ops/half.h"
#include "ops/quantize.h"

namespace nplora {

namespace {

constexpr int kRounds = 3;

// The float16 of which `largest` is the largest integer's multiple. Subnormal ones are few: there it is rounded up, lest the multiple
// falls far short.
float unit_of(float largest, float largest_integer) {
  if (largest == 0) return 0;
  return round_to_half(std::min(largest / largest_integer, kLargestHalf) + kSmallestHalf / 2);
}

float ratio(float x, float unit) {
  return unit == 0 ? 0 : nearest_integer(x / unit);
}

// ---- Q4_K, Q5_K: eight sub-blocks of 32, (d scale) q - dmin minimum, scale and minimum from 0 to 63 ----

constexpr float kLargestScale = 63;

struct AffineBlock {
  static constexpr size_t kSubs = 8, kSize = 32;
  float d = 0, dmin = 0;
  float scale[kSubs] = {}, minimum[kSubs] = {};
  double error = 0;

  CodeGrid grid(size_t j) const { return {d * scale[j], -(dmin * minimum[j])}; }
};

// The best of some grids with m <= 0 for one sub-block, of any numbers.
CodeGrid fit_sub_block(const float* x, Codes codes) {
  constexpr size_t n = AffineBlock::kSize;
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

// Moves every scale and minimum by up to one, to where the values lie nearest.
void settle(const float* x, Codes codes, AffineBlock& b) {
  b.error = 0;
  for (size_t j = 0; j < b.kSubs; ++j) {
    const float scale = b.scale[j], minimum = b.minimum[j];
    float error = INFINITY;
    for (float s = std::max(scale - 1, 0.0f); s <= std::min(scale + 1, kLargestScale); ++s)
      for (float m = std::max(minimum - 1, 0.0f); m <= std::min(minimum + 1, kLargestScale); ++m) {
        const float e = squared_error<AffineBlock::kSize>(x + j * b.kSize, {b.d * s, -(b.dmin * m)}, codes);
        if (e < error) {
          error = e;
          b.scale[j] = s;
          b.minimum[j] = m;
        }
      }
    b.error += error;
  }
}

// d and dmin by least squares for the codes, scales and minima that b has. False where they are not determined.
bool refit(const float* x, Codes codes, AffineBlock& b) {
  double ss = 0, sm = 0, mm = 0, xs = 0, xm = 0;  // over s = scale q, m = minimum
  for (size_t j = 0; j < b.kSubs; ++j) {
    const Moments k = moments<AffineBlock::kSize>(x + j * b.kSize, b.grid(j), codes);
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

AffineBlock best_affine(const float* x, Codes codes) {
  AffineBlock best;
  CodeGrid fits[AffineBlock::kSubs];
  float largest_d = 0, largest_m = 0;
  for (size_t j = 0; j < best.kSubs; ++j) {
    fits[j] = fit_sub_block(x + j * best.kSize, codes);
    largest_d = std::max(largest_d, fits[j].d);
    largest_m = std::max(largest_m, -fits[j].m);
  }
  best.d = unit_of(largest_d, kLargestScale);
  best.dmin = unit_of(largest_m, kLargestScale);
  for (size_t j = 0; j < best.kSubs; ++j) {
    best.scale[j] = std::clamp(ratio(fits[j].d, best.d), 0.0f, kLargestScale);
    best.minimum[j] = std::clamp(ratio(-fits[j].m, best.dmin), 0.0f, kLargestScale);
  }
  settle(x, codes, best);
  for (int i = 1; i < kRounds; ++i) {
    AffineBlock other = best;
    if (!refit(x, codes, other)) break;
    settle(x, codes, other);
    if (!(other.error < best.error)) break;
    best = other;
  }
  return best;
}

template <class Block>
void quantize_affine(size_t blocks, const float* x, Block* out, Codes codes) {
  for (; blocks > 0; --blocks, x += Block::kElements, ++out) {
    const AffineBlock b = best_affine(x, codes);
    *out = {};
    out->d = to_half(b.d);
    out->dmin = to_half(b.dmin);
    for (size_t j = 0; j < b.kSubs; ++j) {
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

// ---- Q6_K: sixteen sub-blocks of 16, (d scale) q, q from -32 to 31, scale from -128 to 127 ----

constexpr Codes kCodes6{-32, 31};

struct ScaledBlock {
  static constexpr size_t kSubs = 16, kSize = 16;
  float d = 0;
  float scale[kSubs] = {};
  double error = 0;
};

// Gives sub-block j the best integer within `reach` of those that are named, and adds its error to b's.
void settle(const float* x, size_t j, std::initializer_list<float> scales, int reach, ScaledBlock& b) {
  float error = INFINITY;
  for (float near : scales)
    for (int step = -reach; step <= reach; ++step) {
      const float s = std::clamp(near + float(step), -128.0f, 127.0f);
      const float e = squared_error<ScaledBlock::kSize>(x + j * b.kSize, {b.d * s}, kCodes6);
      if (e < error) {
        error = e;
        b.scale[j] = s;
      }
    }
  b.error += error;
}

ScaledBlock best_scaled(const float* x) {
  constexpr int kReach = 8;  // of the largest scales: the extreme at codes 31 ... 34
  ScaledBlock best;
  float absmax[ScaledBlock::kSubs] = {}, largest = 0;
  for (size_t j = 0; j < best.kSubs; ++j) {
    for (size_t i = 0; i < best.kSize; ++i) absmax[j] = std::max(absmax[j], std::abs(x[j * best.kSize + i]));
    largest = std::max(largest, absmax[j]);
  }
  best.d = unit_of(largest / kCodes6.last, 127);
  for (size_t j = 0; j < best.kSubs; ++j) {
    const float scale = ratio(absmax[j] / -kCodes6.first, best.d);
    settle(x, j, {scale, -scale}, kReach, best);
  }
  for (int i = 1; i < kRounds; ++i) {
    double xs = 0, ss = 0;
    for (size_t j = 0; j < best.kSubs; ++j) {
      const Moments k = moments<ScaledBlock::kSize>(x + j * best.kSize, {best.d * best.scale[j]}, kCodes6);
      xs += best.scale[j] * k.xq;
      ss += best.scale[j] * best.scale[j] * k.qq;
    }
    if (!(ss > 0)) break;
    ScaledBlock other = best;
    other.d = round_to_half(float(xs / ss));
    other.error = 0;
    for (size_t j = 0; j < other.kSubs; ++j) settle(x, j, {other.scale[j]}, 1, other);
    if (!(other.error < best.error)) break;
    best = other;
  }
  return best;
}

}  // namespace

template <>
void quantize_blocks(size_t blocks, const float* x, BlockQ4_K* out) {
  quantize_affine(blocks, x, out, {0, 15});
}
template <>
void quantize_blocks(size_t blocks, const float* x, BlockQ5_K* out) {
  quantize_affine(blocks, x, out, {0, 31});
}

template <>
void quantize_blocks(size_t blocks, const float* x, BlockQ6_K* out) {
  for (; blocks > 0; --blocks, x += BlockQ6_K::kElements, ++out) {
    const ScaledBlock b = best_scaled(x);
    *out = {};
    out->d = to_half(b.d);
    for (size_t j = 0; j < b.kSubs; ++j) {
      out->scales[j] = static_cast<int8_t>(b.scale[j]);
      const Encoder code({b.d * b.scale[j]}, kCodes6);
      for (size_t i = 0; i < b.kSize; ++i) {
        const size_t at = j * b.kSize + i, half = at / 128, strip = at % 128 / kStrip, l = at % kStrip;
        const auto q = static_cast<unsigned>(code(x[at]) - kCodes6.first);
        uint8_t &low = out->low[64 * half + strip % 2 * kStrip + l], &high = out->high[half * kStrip + l];
        low = static_cast<uint8_t>(low | (q & 15) << (strip / 2 * 4));
        high = static_cast<uint8_t>(high | (q >> 4) << (2 * strip));
      }
    }
  }
}

}  // namespace nplora
