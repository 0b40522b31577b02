// Vectors that hold the 32 codes of a sub-block. Two of these vectors are multiplied code by code, as
// integers, and the 32 products are summed in eight lanes. Only kernel units may include this file (see
// vec.h).
//
//   `load_sub_block(p)` loads 32 bytes. `join(low, high)` makes a SubBlock from two vectors of type Bytes.
//     `lookup(levels, s)` returns levels[byte] for each byte of s, as in vec_bytes.h.
//   `dot(u, x)` multiplies `u` and `x` byte by byte. Each of the eight lanes of the result is the sum of four
//     products. Lanes 0 to 3 sum the first half of the bytes, and lanes 4 to 7 sum the second half. The bytes
//     of `x` must be from -127 to 127. The bytes of `u` must be from 0 to 127, or from 0 to 255 with VNNI.
//   `dot_signed(w, x)` does the same as `dot` for any signed bytes `w`.
//   `to_floats(sums)` converts the eight integer sums to floats.
//   `keep(v)` makes the compiler compute `v` as a whole vector, with AVX2 and AVX-512.
//   `spread(two)` puts `two[0]` into lanes 0 to 3 and `two[1]` into lanes 4 to 7.
//   `sum(v)` returns the sum of the eight lanes of `v`. The order of the additions is fixed.
#pragma once

#include "simd/vec_bytes.h"

namespace nplora::kernels::NPLORA_ISA {

typedef uint8_t SubBlock __attribute__((vector_size(kSubBlock)));
typedef int8_t SignedSubBlock __attribute__((vector_size(kSubBlock)));
typedef uint16_t SubBlockWords __attribute__((vector_size(kSubBlock)));
typedef int32_t EightInts __attribute__((vector_size(kSubBlock)));
typedef uint32_t EightBits __attribute__((vector_size(kSubBlock)));
typedef float Eight __attribute__((vector_size(kSubBlock)));

inline SubBlock load_sub_block(const void* p) {
  SubBlock s;
  __builtin_memcpy(&s, p, sizeof s);
  return s;
}
inline Eight load_eight(const float* p) {
  Eight e;
  __builtin_memcpy(&e, p, sizeof e);
  return e;
}

// x - 0 is always x, so compilers leave out the subtraction. They must keep x + 0, because -0 + 0 is 0.
inline Eight broadcast_eight(float x) {
  return x - Eight{};
}
// Keeps `v` in one register, with AVX2 and AVX-512. Otherwise, if the code reads the lanes of `v` one by one,
// Clang computes them one by one, too.
[[gnu::always_inline]] inline void keep([[maybe_unused]] Eight& v) {
#if defined(NPLORA_SIMD_AVX512) || defined(NPLORA_SIMD_AVX2)
  __asm__("" : "+v"(v));
#endif
}
inline Eight to_floats(EightInts sums) {
  return __builtin_convertvector(sums, Eight);
}
inline Eight spread(const float* two) {
#if defined(NPLORA_SIMD_AVX512) || defined(NPLORA_SIMD_AVX2)
  double both;
  __builtin_memcpy(&both, two, sizeof both);
  return (Eight)_mm256_permutevar_ps(_mm256_castpd_ps(_mm256_set1_pd(both)),
                                     _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
#else
  return Eight{two[0], two[0], two[0], two[0], two[1], two[1], two[1], two[1]};
#endif
}
inline float sum(Eight v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

// Shifts the bits of each byte, as `move` in vec_bytes.h does.
inline SubBlock move(SubBlock s, size_t from, size_t to, uint8_t mask) {
  return (SubBlock)(from <= to ? (SubBlockWords)s << (to - from) : (SubBlockWords)s >> (from - to)) & mask;
}

#if defined(NPLORA_SIMD_AVX512) || defined(NPLORA_SIMD_AVX2)

inline SubBlock join(Bytes low, Bytes high) {
  return (SubBlock)_mm256_set_m128i((__m128i)high, (__m128i)low);
}

inline SubBlock lookup(Bytes levels, SubBlock s) {
  return (SubBlock)_mm256_shuffle_epi8((__m256i)join(levels, levels), (__m256i)s);
}

inline EightInts dot(SubBlock u, SubBlock x) {
#if defined(NPLORA_SIMD_VNNI)
  return (EightInts)_mm256_dpbusd_epi32(_mm256_setzero_si256(), (__m256i)u, (__m256i)x);
#else  // the sum of two products is at most 2 * 128 * 127, which fits into 16 bits
  return (EightInts)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)u, (__m256i)x), _mm256_set1_epi16(1));
#endif
}
// Computes w * x as |w| * (x times the sign of w), because `dot` needs unsigned bytes. A magnitude of 128
// still fits into an unsigned byte, and the sum of two products still fits into 16 bits.
inline EightInts dot_signed(SubBlock w, SubBlock x) {
  return dot((SubBlock)_mm256_abs_epi8((__m256i)w), (SubBlock)_mm256_sign_epi8((__m256i)x, (__m256i)w));
}

#else

inline SubBlock join(Bytes low, Bytes high) {
  SubBlock s;
  __builtin_memcpy(&s, &low, sizeof low);
  __builtin_memcpy(reinterpret_cast<char*>(&s) + sizeof low, &high, sizeof high);
  return s;
}

inline SubBlock lookup(Bytes levels, SubBlock s) {
  Bytes halves[2];
  __builtin_memcpy(halves, &s, sizeof s);
  return join(lookup(levels, halves[0]), lookup(levels, halves[1]));
}

#if defined(NPLORA_SIMD_NEON)

// Multiplies 16 bytes of `w` by 16 bytes of `x`. Each lane of the result is the sum of four products. The
// products are first added in pairs. The sum of a pair is at most 2 * 128 * 127, which fits into 16 bits.
inline int32x4_t dot_half(int8x16_t w, int8x16_t x) {
  const int16x8_t products = vmull_s8(vget_low_s8(w), vget_low_s8(x));
  return vpaddlq_s16(vmlal_s8(products, vget_high_s8(w), vget_high_s8(x)));
}
inline EightInts dot_signed(SubBlock w, SubBlock x) {
  int8x16_t from[4];
  __builtin_memcpy(from, &w, sizeof w);
  __builtin_memcpy(from + 2, &x, sizeof x);
  const int32x4_t sums[] = {dot_half(from[0], from[2]), dot_half(from[1], from[3])};
  EightInts r;
  __builtin_memcpy(&r, sums, sizeof r);
  return r;
}

#else

[[gnu::noinline]] inline EightInts dot_signed(SubBlock w, SubBlock x) {
  int32_t sums[8] = {};
  for (size_t i = 0; i < kSubBlock; ++i) sums[i / 4] += static_cast<int8_t>(w[i]) * static_cast<int8_t>(x[i]);
  EightInts r;
  __builtin_memcpy(&r, sums, sizeof r);
  return r;
}

#endif

inline EightInts dot(SubBlock u, SubBlock x) {
  return dot_signed(u, x);
}

#endif

}  // namespace nplora::kernels::NPLORA_ISA
