// Vectors of sixteen bytes, for the codes of quantised weights before the kernels convert the codes to
// floats. Only kernel units may include this file (see vec.h).
//
//   `move(b, from, to, mask)` shifts the bits of each byte so that bit `from` becomes bit `to`, and then
//     clears the bits that are not in `mask`.
//   `each_bit(bits, value)` sets byte i to `value` if bit i of `bits` is set, else to 0.
//   `interleave(a, b)` returns the bytes a0 b0 a1 b1 ... a7 b7 as `low` and the bytes a8 b8 ... a15 b15 as
//     `high`.
//   `widen(b)` converts the bytes, as signed numbers, to floats.
//   `lookup(levels, b)` returns levels[byte] for each byte of b. All bytes of b must be below 16. The levels
//     are floats or bytes.
//   `Nibbles(offset, d)` decodes a nibble q to d * (q - offset), and `Nibbles(d, m)` decodes q to d * q + m.
//     In the following functions, `nibbles` is a Nibbles object. `low(nibbles, b)` decodes the low nibble of
//     each byte of b. `high(nibbles, b)` decodes the high nibble of each byte. `nibbles.all()` returns the
//     decoded values of the nibbles 0 to 15.
#pragma once

#include "simd/vec.h"

namespace nplora::kernels::NPLORA_ISA {

inline constexpr size_t kBytes = 16, kVectors = kBytes / Vec<float>::kLanes;
typedef uint8_t Bytes __attribute__((vector_size(kBytes)));
typedef uint16_t Words __attribute__((vector_size(kBytes)));
typedef uint64_t Longs __attribute__((vector_size(kBytes)));

struct BytePair {
  Bytes low, high;
};

// Sixteen floats, one for each byte of a vector of type Bytes.
struct Floats {
  Vec<float> v[kVectors];
};

inline Bytes load_bytes(const void* p) {
  Bytes b;
  __builtin_memcpy(&b, p, sizeof b);
  return b;
}

inline Bytes pair(uint64_t low, uint64_t high) {
  return (Bytes)(Longs){low, high};
}

// Few machines can shift single bytes, so `move` shifts words of two bytes. The mask must clear the bits that
// cross from one byte of a word into the other byte.
inline Bytes move(Bytes b, size_t from, size_t to, uint8_t mask) {
  return (Bytes)(from <= to ? (Words)b << (to - from) : (Words)b >> (from - to)) & mask;
}

#if defined(NPLORA_SIMD_AVX512)

inline Floats widen(Bytes b) {
  return {{{_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)b))}}};
}

// Converts bytes to indices for the function `permuted`, which reads only the low four bits of each index.
// The empty asm statement keeps the indices in a register. Clang would otherwise shift the bytes instead of
// the indices, and would convert the low and the high nibbles separately.
typedef uint32_t Indices __attribute__((vector_size(64)));
inline Indices indices(Bytes b) {
  auto at = (Indices)_mm512_cvtepu8_epi32((__m128i)b);
  __asm__("" : "+v"(at));
  return at;
}
inline Floats permuted(__m512 values, Indices at) {
  return {{{_mm512_permutexvar_ps((__m512i)at, values)}}};
}

struct Levels {
  __m512 v;
  explicit Levels(const float (&levels)[16]) : v(_mm512_loadu_ps(levels)) {}
};
inline Floats lookup(const Levels& levels, Bytes b) {
  return permuted(levels.v, indices(b));
}

inline Bytes lookup(Bytes levels, Bytes b) {
  return (Bytes)_mm_shuffle_epi8((__m128i)levels, (__m128i)b);
}

inline BytePair interleave(Bytes a, Bytes b) {
  return {(Bytes)_mm_unpacklo_epi8((__m128i)a, (__m128i)b), (Bytes)_mm_unpackhi_epi8((__m128i)a, (__m128i)b)};
}

// A table with the decoded values of all 16 nibbles. One permutation instruction looks up the values of 16
// nibbles. This instruction reads only the low four bits of each index, so `low` need not clear the high
// nibble.
struct Nibbles {
  __m512 values;
  Nibbles(int offset, Vec<float> d) : values(_mm512_mul_ps(codes(offset), d.v)) {}
  Nibbles(Vec<float> d, Vec<float> m) : values(_mm512_fmadd_ps(codes(0), d.v, m.v)) {}
  Floats all() const { return {{{values}}}; }
  static __m512 codes(int offset) {
    const __m512i q = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(q, _mm512_set1_epi32(offset)));
  }
};
inline Floats low(const Nibbles& n, Bytes b) {
  return permuted(n.values, indices(b));
}
inline Floats high(const Nibbles& n, Bytes b) {
  return permuted(n.values, indices(b) >> 4);
}

#elif defined(NPLORA_SIMD_AVX2)

inline Bytes lookup(Bytes levels, Bytes b) {
  return (Bytes)_mm_shuffle_epi8((__m128i)levels, (__m128i)b);
}

struct Ints {
  __m256i first, second;
};
inline Ints widen_to_int(Bytes b) {
  const __m128i bytes = (__m128i)b;
  return {_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_unpackhi_epi64(bytes, bytes))};
}
inline Floats widen(Bytes b) {
  const Ints ints = widen_to_int(b);
  return {{{_mm256_cvtepi32_ps(ints.first)}, {_mm256_cvtepi32_ps(ints.second)}}};
}

struct Levels {
  __m256 low, high;
  explicit Levels(const float (&levels)[16])
      : low(_mm256_loadu_ps(levels)), high(_mm256_loadu_ps(levels + 8)) {}
};
// If bit 3 of an index is 0, the level comes from `levels.low`, else from `levels.high`. The shift moves bit
// 3 to the sign bit, which the blend instruction reads.
inline Vec<float> lookup(const Levels& levels, __m256i at) {
  return {_mm256_blendv_ps(_mm256_permutevar8x32_ps(levels.low, at),
                           _mm256_permutevar8x32_ps(levels.high, at),
                           _mm256_castsi256_ps(_mm256_slli_epi32(at, 28)))};
}
inline Floats lookup(const Levels& levels, Bytes b) {
  const Ints at = widen_to_int(b);
  return {{lookup(levels, at.first), lookup(levels, at.second)}};
}

inline BytePair interleave(Bytes a, Bytes b) {
  return {(Bytes)_mm_unpacklo_epi8((__m128i)a, (__m128i)b), (Bytes)_mm_unpackhi_epi8((__m128i)a, (__m128i)b)};
}

#elif defined(NPLORA_SIMD_NEON)

inline Bytes lookup(Bytes levels, Bytes b) {
  return (Bytes)vqtbl1q_u8((uint8x16_t)levels, (uint8x16_t)b);
}

inline Floats widen(Bytes b) {
  const int8x16_t bytes = (int8x16_t)b;
  const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_high_s8(bytes);
  return {{{vcvtq_f32_s32(vmovl_s16(vget_low_s16(low)))},
           {vcvtq_f32_s32(vmovl_high_s16(low))},
           {vcvtq_f32_s32(vmovl_s16(vget_low_s16(high)))},
           {vcvtq_f32_s32(vmovl_high_s16(high))}}};
}

// The 16 levels, stored as four vectors of bytes: vector i holds byte i of each level.
struct Levels {
  uint8x16x4_t planes;
  explicit Levels(const float (&levels)[16]) : planes(vld4q_u8(reinterpret_cast<const uint8_t*>(levels))) {}
};
inline Floats lookup(const Levels& levels, Bytes b) {
  const uint8x16_t at = (uint8x16_t)b;
  const uint8x16_t p0 = vqtbl1q_u8(levels.planes.val[0], at), p1 = vqtbl1q_u8(levels.planes.val[1], at);
  const uint8x16_t p2 = vqtbl1q_u8(levels.planes.val[2], at), p3 = vqtbl1q_u8(levels.planes.val[3], at);
  const uint16x8_t lows[] = {vreinterpretq_u16_u8(vzip1q_u8(p0, p1)),
                             vreinterpretq_u16_u8(vzip2q_u8(p0, p1))};
  const uint16x8_t highs[] = {vreinterpretq_u16_u8(vzip1q_u8(p2, p3)),
                              vreinterpretq_u16_u8(vzip2q_u8(p2, p3))};
  return {{{vreinterpretq_f32_u16(vzip1q_u16(lows[0], highs[0]))},
           {vreinterpretq_f32_u16(vzip2q_u16(lows[0], highs[0]))},
           {vreinterpretq_f32_u16(vzip1q_u16(lows[1], highs[1]))},
           {vreinterpretq_f32_u16(vzip2q_u16(lows[1], highs[1]))}}};
}

inline BytePair interleave(Bytes a, Bytes b) {
  return {(Bytes)vzip1q_u8((uint8x16_t)a, (uint8x16_t)b), (Bytes)vzip2q_u8((uint8x16_t)a, (uint8x16_t)b)};
}

#else

// In the generic unit (isa_generic.cpp), long functions are not inlined. With inlining, two fifths of the
// library's code belonged to the generic unit, although few machines use this unit.
[[gnu::noinline]] inline Bytes lookup(Bytes levels, Bytes b) {
  uint8_t from[kBytes], r[kBytes];
  __builtin_memcpy(from, &levels, sizeof from);
  for (size_t i = 0; i < kBytes; ++i) r[i] = from[b[i]];
  return load_bytes(r);
}

inline Floats widen(Bytes b) {
  float f[kBytes];
  for (size_t i = 0; i < kBytes; ++i) f[i] = static_cast<int8_t>(b[i]);
  Floats r;
  __builtin_memcpy(&r, f, sizeof r);
  return r;
}

struct Levels {
  const float* levels;
  explicit Levels(const float (&l)[16]) : levels(l) {}
};
[[gnu::noinline]] inline Floats lookup(const Levels& levels, Bytes b) {
  float f[kBytes];
  for (size_t i = 0; i < kBytes; ++i) f[i] = levels.levels[b[i]];
  Floats r;
  __builtin_memcpy(&r, f, sizeof r);
  return r;
}

inline BytePair interleave(Bytes a, Bytes b) {
  unsigned char low[kBytes], high[kBytes];
  for (size_t i = 0; i < kBytes / 2; ++i) {
    low[2 * i] = a[i];
    low[2 * i + 1] = b[i];
    high[2 * i] = a[kBytes / 2 + i];
    high[2 * i + 1] = b[kBytes / 2 + i];
  }
  BytePair r;
  __builtin_memcpy(&r.low, low, sizeof low);
  __builtin_memcpy(&r.high, high, sizeof high);
  return r;
}

#endif

// Interleaves words of two bytes. The words of `a` and `b` alternate in the result: a0 b0 a1 b1 ... The
// result is returned in two halves, `low` and `high`.
inline BytePair interleave_words(Bytes a, Bytes b) {
#if defined(NPLORA_SIMD_AVX512) || defined(NPLORA_SIMD_AVX2)
  return {(Bytes)_mm_unpacklo_epi16((__m128i)a, (__m128i)b),
          (Bytes)_mm_unpackhi_epi16((__m128i)a, (__m128i)b)};
#elif defined(NPLORA_SIMD_NEON)
  return {(Bytes)vzip1q_u16((uint16x8_t)a, (uint16x8_t)b), (Bytes)vzip2q_u16((uint16x8_t)a, (uint16x8_t)b)};
#else
  const auto x = (Words)a, y = (Words)b;
  return {(Bytes)(Words){x[0], y[0], x[1], y[1], x[2], y[2], x[3], y[3]},
          (Bytes)(Words){x[4], y[4], x[5], y[5], x[6], y[6], x[7], y[7]}};
#endif
}

inline Bytes low_nibbles(Bytes b) {
  return b & 15;
}
inline Bytes high_nibbles(Bytes b) {
  return move(b, 4, 0, 15);
}

#if !defined(NPLORA_SIMD_AVX512)
struct Nibbles {
  uint8_t offset;
  Vec<float> d, m;
  bool adds;
  Nibbles(uint8_t offset, Vec<float> d) : offset(offset), d(d), m(d), adds(false) {}
  Nibbles(Vec<float> d, Vec<float> m) : offset(0), d(d), m(m), adds(true) {}
  Floats values(Bytes q) const {
    Floats f = widen(q - offset);
    for (size_t i = 0; i < kVectors; ++i) f.v[i] = adds ? fma(f.v[i], d, m) : f.v[i] * d;
    return f;
  }
  Floats all() const { return values(Bytes{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}); }
};
inline Floats low(const Nibbles& n, Bytes b) {
  return n.values(low_nibbles(b));
}
inline Floats high(const Nibbles& n, Bytes b) {
  return n.values(high_nibbles(b));
}
#endif

#if defined(NPLORA_SIMD_AVX512)
inline Bytes each_bit(uint16_t bits, uint8_t value) {
  return (Bytes)_mm_maskz_set1_epi8(bits, static_cast<char>(value));
}
#else
inline Bytes each_bit(uint16_t bits, uint8_t value) {
  constexpr uint64_t kEachByte = 0x0101010101010101;
  const Bytes bytes = pair((bits & 0xFF) * kEachByte, (bits >> 8) * kEachByte);
  const Bytes places = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
  return (Bytes)((bytes & places) == places) & value;
}
#endif

}  // namespace nplora::kernels::NPLORA_ISA
