// BFDOT of FEAT_BF16 in software, from the Arm Architecture Reference Manual (DDI 0487, "BFDOT (vector)"). It
// assumes FPCR.EBF = 0, the state of every process that does not request another. Each product, their sum,
// and its sum with the accumulator are rounded in turn, each to odd. Subnormal operands and results become
// zeros.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

// Rounds to odd: cuts x off towards zero, and sets the last bit if anything was lost. `rest` is what x itself
// lost before (only its sign matters, and whether it is zero). Results beyond the largest number are
// infinity, results below the smallest normal number are zero.
inline float round_to_odd(double x, double rest = 0) {
  if (!std::isfinite(x) || std::abs(x) >= 0x1p128) return static_cast<float>(x);
  if (rest != 0 && std::signbit(rest) != std::signbit(x)) x = std::nextafter(x, 0.0);
  if (std::abs(x) < 0x1p-126) return std::copysign(0.0f, static_cast<float>(x));
  float cut = static_cast<float>(x);
  if (std::abs(static_cast<double>(cut)) > std::abs(x)) cut = std::nextafter(cut, 0.0f);
  const bool exact = rest == 0 && cut == x;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(cut) | (exact ? 0 : 1));
}

inline float flush(float x) {
  return std::abs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x;
}

inline float add_to_odd(float a, float b) {
  const double x = flush(a), y = flush(b), sum = x + y, shifted = sum - x;
  const double rest =
      std::isfinite(sum) ? (x - (sum - shifted)) + (y - shifted) : 0;  // Knuth's TwoSum: exact
  return round_to_odd(sum, rest);
}

// a and b are bfloat16 values, so their product fits a double.
inline float multiply_to_odd(float a, float b) {
  return round_to_odd(double{flush(a)} * double{flush(b)});
}

inline float bfdot(float sum, const float (&a)[2], const float (&b)[2]) {
  return add_to_odd(sum, add_to_odd(multiply_to_odd(a[0], b[0]), multiply_to_odd(a[1], b[1])));
}
