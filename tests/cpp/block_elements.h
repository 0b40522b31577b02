// The formulas of the low-bit formats. They take a block apart bit by bit and compute in double.
#pragma once

#include <cmath>

#include "numbers.h"
#include "ops/block_formats.h"

using namespace nplora;

// From the definition of float16, so that it shares no code with what is tested.
inline double value(Half half) {
  const int bits = half.bytes[0] | half.bytes[1] << 8, exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  const double unit =
      std::bit_cast<double>(uint64_t(std::max(exponent, 1) - 25 + 1023) << 52);  // 2^(exponent - 25)
  return sign * (fraction + (exponent ? 1024 : 0)) * unit;
}

inline int bit(const uint8_t* bytes, size_t i) {
  return bytes[i / 8] >> (i % 8) & 1;
}

// Elements 0 ... n / 2 - 1 are in the low halves of the bytes, the others in the high halves.
inline int nibble(const uint8_t* bytes, size_t n, size_t i) {
  return i < n / 2 ? bytes[i] & 15 : bytes[i - n / 2] >> 4;
}

// ---- element i of a block: products and sums of these few bits are exact in double ----

inline double element(const BlockQ4_0& b, size_t i) {
  return value(b.d) * (nibble(b.q, 32, i) - 8);
}
inline double element(const BlockQ4_1& b, size_t i) {
  return value(b.d) * nibble(b.q, 32, i) + value(b.m);
}
inline double element(const BlockQ5_0& b, size_t i) {
  return value(b.d) * (nibble(b.q, 32, i) + 16 * bit(b.high, i) - 16);
}
inline double element(const BlockQ5_1& b, size_t i) {
  return value(b.d) * (nibble(b.q, 32, i) + 16 * bit(b.high, i)) + value(b.m);
}
inline double element(const BlockQ8_0& b, size_t i) {
  return value(b.d) * b.q[i];
}

inline int scale(const uint8_t* s, size_t j) {
  return j < 4 ? s[j] & 63 : (s[j + 4] & 15) | s[j - 4] >> 6 << 4;
}
inline int minimum(const uint8_t* s, size_t j) {
  return j < 4 ? s[j + 4] & 63 : s[j + 4] >> 4 | s[j] >> 6 << 4;
}
inline double element(const BlockQ4_K& b, size_t i) {
  const int q = nibble(b.q + i / 64 * 32, 64, i % 64);
  return value(b.d) * scale(b.scales, i / 32) * q - value(b.dmin) * minimum(b.scales, i / 32);
}
inline double element(const BlockQ5_K& b, size_t i) {
  const int q = nibble(b.q + i / 64 * 32, 64, i % 64) + 16 * (b.high[i % 32] >> (i / 32) & 1);
  return value(b.d) * scale(b.scales, i / 32) * q - value(b.dmin) * minimum(b.scales, i / 32);
}
inline double element(const BlockQ6_K& b, size_t i) {
  const size_t half = i / 128, l = i % 128;
  const int q = nibble(b.low + half * 64, 128, l) + 16 * (b.high[half * 32 + l % 32] >> (2 * (l / 32)) & 3);
  return value(b.d) * b.scales[i / 16] * (q - 32);
}

// Written out once more, so that the test shares nothing with what is tested.
inline constexpr int kIQ4[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
inline double element(const BlockIQ4_NL& b, size_t i) {
  return value(b.d) * kIQ4[nibble(b.q, 32, i)];
}
// Scale i: four bits are in a nibble of the first eight bytes, two in the last four bytes.
inline int scale(const BlockQ3_K& b, size_t i) {
  return (b.scales[i % 8] >> (i / 8 * 4) & 15) + 16 * (b.scales[8 + i % 4] >> (i / 4 * 2) & 3) - 32;
}
inline double element(const BlockQ3_K& b, size_t i) {
  const int low = b.low[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3,
            high = b.high[i % 32] >> (i / 32) & 1;
  return value(b.d) * scale(b, i / 16) * (low + 4 * high - 4);
}
inline double element(const BlockQ2_K& b, size_t i) {
  const int q = b.q[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3, s = b.scales[i / 16];
  return value(b.d) * (s & 15) * q - value(b.dmin) * (s >> 4);
}
inline double element(const BlockIQ4_XS& b, size_t i) {
  const size_t j = i / 32;
  const int high = (b.scales_high[0] | b.scales_high[1] << 8) >> (2 * j) & 3;
  const int s = (b.scales_low[j / 2] >> (j % 2 * 4) & 15) + 16 * high - 32;
  return value(b.d) * s * kIQ4[nibble(b.q + 16 * j, 32, i % 32)];
}

// Calls body.operator()<Block>(format) for each row format.
template <class Body>
void for_block_types(const Body& body) {
#define NPLORA_CALL(name, Name) body.template operator()<Block##Name>(BlockFormat::k##Name);
  NPLORA_ROW_FORMATS(NPLORA_CALL)
#undef NPLORA_CALL
}

// The largest error of a quantised value, divided by its block's absmax.
template <class Block>
inline constexpr double kQuantizedWithin = 0;
template <>
inline constexpr double kQuantizedWithin<BlockQ4_0> = 0.25;
template <>
inline constexpr double kQuantizedWithin<BlockQ5_0> = 0.12;
template <>
inline constexpr double kQuantizedWithin<BlockQ4_1> = 0.2;
template <>
inline constexpr double kQuantizedWithin<BlockQ5_1> = 0.1;
template <>  // the codes are chosen for d before it is rounded
inline constexpr double kQuantizedWithin<BlockQ8_0> = 0.5 / 127 + 0x1p-11;
template <>
inline constexpr double kQuantizedWithin<BlockQ4_K> = 0.25;
template <>
inline constexpr double kQuantizedWithin<BlockQ5_K> = 0.12;
template <>
inline constexpr double kQuantizedWithin<BlockQ6_K> = 0.06;
template <>
inline constexpr double kQuantizedWithin<BlockIQ4_NL> = 0.12;
template <>
inline constexpr double kQuantizedWithin<BlockQ3_K> = 0.3;
template <>
inline constexpr double kQuantizedWithin<BlockQ2_K> = 0.55;
template <>
inline constexpr double kQuantizedWithin<BlockIQ4_XS> = 0.15;

// Small integers: every product and every sum is exact, in any order.
inline Half draw_integer(Random& random) {
  constexpr Half kIntegers[] = {
      {{0, 0}}, {{0, 0x3C}}, {{0, 0xBC}}, {{0, 0x40}}, {{0, 0xC0}}};  // 0, 1, -1, 2, -2
  return kIntegers[random.below(std::size(kIntegers))];
}
