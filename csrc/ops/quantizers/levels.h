// Codes for sixteen levels that need not be evenly spaced.
#pragma once

#include <cstdint>

#include "ops/quantizers/code_grid.h"

namespace nplora {

// A group has kSize values. Each value is rounded to d times one of the levels kLevels, which are in
// ascending order. The code of a level is its index in kLevels.
template <size_t kGroupSize, const int8_t (&kLevels)[16]>
struct LevelCodes {
  static constexpr size_t kSize = kGroupSize;

  // The code of the level nearest to x.
  static int code(float x) {
    int q = 0;
    for (int i = 0; i < 15; ++i) q += x > 0.5f * float(kLevels[i] + kLevels[i + 1]);
    return q;
  }
  static float level(float x) {
    float nearest = kLevels[0];
    for (int i = 0; i < 15; ++i)
      nearest = x > 0.5f * float(kLevels[i] + kLevels[i + 1]) ? float(kLevels[i + 1]) : nearest;
    return nearest;
  }
  static float inverse(float d) { return d == 0 ? 0 : 1 / d; }

  static float error(const float* x, float d) {
    const float scale = inverse(d);
    return sum<kSize>([&](size_t i) {
      const float error = x[i] - d * level(x[i] * scale);
      return error * error;
    });
  }
  static Moments sums(const float* x, float d) {
    const float scale = inverse(d);
    float q[kSize];
    for (size_t i = 0; i < kSize; ++i) q[i] = level(x[i] * scale);
    return {double(kSize), sum<kSize>([&](size_t i) { return x[i]; }),
            sum<kSize>([&](size_t i) { return q[i]; }), sum<kSize>([&](size_t i) { return x[i] * q[i]; }),
            sum<kSize>([&](size_t i) { return q[i] * q[i]; })};
  }
};

}  // namespace nplora
