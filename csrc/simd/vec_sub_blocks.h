// The codes of sub-blocks: 32 bytes, multiplied as integers and summed in eight lanes. See vec.h for the
// rules of kernel units.
//
//   load_sub_block(p), join(low, high), lookup(levels, s): as for Bytes
//   dot(u, x)          lane i = the sum of u * x over four of the elements: of the first half for i < 4,
//                      else of the second. u is from 0 to 127, x is at least -127
//   dot_signed(w, x)   the same for any w
//   to_floats(sums)
//   spread(low, high)  low in lanes 0 ... 3, high in the others
//   sum(v)             the sum of the lanes of an Eight, in a fixed tree
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

inline Eight broadcast_eight(float x) {
  return Eight{} + x;
}
inline Eight to_floats(EightInts sums) {
  return __builtin_convertvector(sums, Eight);
}
inline Eight spread(float low, float high) {
  return Eight{low, low, low, low, high, high, high, high};
}
inline float sum(Eight v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

// Like move for Bytes.
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
#else  // the sum of two products of 127 * 127 fits into 16 bits
  return (EightInts)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)u, (__m256i)x), _mm256_set1_epi16(1));
#endif
}
// Moves the sign of w to x. If |w| is 128, it is still an unsigned byte, and the sum of two products still
// fits.
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

// The sum of two products of 128 * 127 fits into 16 bits.
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
