// Formats with a scale for each group of values, but no minimum. A value is (d * scale) * q. The number q is
// the code of the value (in IQ4_XS: the level that a table gives for the code). The float16 number d is
// stored once for each block.
#pragma once

#include <initializer_list>

#include "ops/quantizers/scale_groups.h"

namespace nplora {

// Codes for groups of kSize values. The codes q are the integers from kFirst to kLast.
template <size_t kGroupSize, int kFirst, int kLast>
struct IntegerCodes {
  static constexpr size_t kSize = kGroupSize;
  static constexpr CodeRange kCodeRange{kFirst, kLast};

  static float error(const float* x, float d) { return squared_error<kSize>(x, {d}, kCodeRange); }
  static Moments sums(const float* x, float d) { return moments<kSize>(x, {d}, kCodeRange); }
};

// A block and its error. `Format` has these members: kSize is the number of values in a group, kGroups is the
// number of groups, and kLeastScale and kMostScale are the limits of the integer scales. The functions
// `error` and `sums` round a group to codes; `error` returns the squared error, and `sums` returns the
// Moments of the values and codes.
template <class Format>
struct ScaledBlock {
  static constexpr size_t kGroups = Format::kGroups, kSize = Format::kSize;
  float d = 0;
  float scale[kGroups] = {};
  double error = 0;

  // Chooses the scale of group j. Tries all integers that differ by at most `reach` from one of the numbers
  // `scales`. Sets the scale to the best of these integers, and adds the error of the group to the error of
  // the block.
  void settle(const float* x, size_t j, std::initializer_list<float> scales, int reach) {
    float least = INFINITY;
    for (float near : scales)
      for (int step = -reach; step <= reach; ++step) {
        const float s = std::clamp(near + float(step), Format::kLeastScale, Format::kMostScale);
        const float e = Format::error(x + j * kSize, d * s);
        if (e < least) {
          least = e;
          scale[j] = s;
        }
      }
    error += least;
  }
};

inline float absmax(size_t n, const float* x) {
  float most = 0;
  for (size_t i = 0; i < n; ++i) most = std::max(most, std::abs(x[i]));
  return most;
}

// Fits d to the current scales and codes, and then chooses new scales and codes for the new d. Repeats both
// steps as long as the error becomes smaller, at most kRounds - 1 times.
template <class Format>
ScaledBlock<Format> refined(const float* x, ScaledBlock<Format> best) {
  for (int i = 1; i < kRounds; ++i) {
    double xs = 0, ss = 0;
    for (size_t j = 0; j < best.kGroups; ++j) {
      const Moments k = Format::sums(x + j * best.kSize, best.d * best.scale[j]);
      xs += best.scale[j] * k.xq;
      ss += best.scale[j] * best.scale[j] * k.qq;
    }
    if (!(ss > 0)) break;
    ScaledBlock<Format> other = best;
    other.d = round_to_half(float(xs / ss));
    other.error = 0;
    for (size_t j = 0; j < other.kGroups; ++j) other.settle(x, j, {other.scale[j]}, 1);
    if (!(other.error < best.error)) break;
    best = other;
  }
  return best;
}

// Searches with several values of d, and returns the best block. The values of d lie between unit * (1 - 1 /
// kMostScale) and `unit`. The first scale of a group turns the largest magnitude of the group into a code of
// magnitude `extreme`. The search tries the integers that differ by at most `reach` from the first scale or
// from its negative.
template <class Format>
ScaledBlock<Format> best_of_starts(const float* x, float unit, float extreme, int reach) {
  constexpr int kStarts = 4;
  ScaledBlock<Format> best;
  best.error = INFINITY;
  for (int i = 0; i < kStarts; ++i) {
    ScaledBlock<Format> block;
    block.d = round_to_half(unit * (1 - float(i) / (kStarts * Format::kMostScale)));
    for (size_t j = 0; j < block.kGroups; ++j) {
      const float scale = ratio(absmax(block.kSize, x + j * block.kSize) / extreme, block.d);
      block.settle(x, j, {scale, -scale}, reach);
    }
    block = refined(x, block);
    if (block.error < best.error) best = block;
  }
  return best;
}

}  // namespace nplora
