// Vectors with four int8 codes in each 32-bit lane. Two of these vectors are multiplied code by code, as
// integers, and the four products of each lane are summed. Only kernel units may include this file (see
// vec.h).
//
//   `all_lanes(x)` returns a Vec<float> with x in all lanes.
//   `LaneInts` has a 32-bit integer for each lane of Vec<float>. `floats_of(v)` converts the integers of a
//     LaneInts to floats. `to_ints(v)` rounds floats to the nearest integers, ties to even. `to_ints` accepts
//     floats from -2^22 to 2^22, and converts NaN to an unspecified integer.
//   `kCodeOffset` is a number that is added to each code of W before the code is stored in memory. With VNNI,
//     `kCodeOffset` is 128: the stored codes are then unsigned, as the instruction vpdpbusd requires. Without
//     VNNI, `kCodeOffset` is 0.
//   `load_quads(p)` loads a vector of codes.
//   `dot_vectors(sums, w, x)` multiplies each vector w[v] by the vector `x`. In each lane, the four codes of
//     w[v] are multiplied by the four codes of `x`, and the four products are added to the lane of sums[v].
//     The codes of `w` include kCodeOffset.
#pragma once

#include "simd/vec.h"

namespace nplora::kernels::NPLORA_ISA {

inline constexpr size_t kIntLanes = Vec<float>::kLanes;
typedef int32_t LaneInts __attribute__((vector_size(4 * kIntLanes)));
typedef int32_t UnalignedInts __attribute__((vector_size(4 * kIntLanes), aligned(4), may_alias));
typedef int8_t LaneCodes __attribute__((vector_size(kIntLanes)));

inline Vec<float> all_lanes(float x) {
  return {x - decltype(Vec<float>::v){}};  // see broadcast_eight in vec_sub_blocks.h
}
inline LaneInts broadcast_int(int32_t x) {
  return LaneInts{} + x;
}
inline Vec<float> floats_of(LaneInts v) {
  return {__builtin_convertvector(v, decltype(Vec<float>::v))};
}
inline int32_t largest_lane(LaneInts v) {
#if defined(NPLORA_SIMD_AVX512)
  return _mm512_reduce_max_epi32((__m512i)v);
#elif defined(NPLORA_SIMD_NEON)
  return vmaxvq_s32((int32x4_t)v);
#else
  int32_t largest = v[0];
  for (size_t i = 1; i < kIntLanes; ++i) largest = v[i] > largest ? v[i] : largest;
  return largest;
#endif
}
inline int32_t sum_of_lanes(LaneInts v) {
#if defined(NPLORA_SIMD_AVX512)
  return _mm512_reduce_add_epi32((__m512i)v);
#elif defined(NPLORA_SIMD_NEON)
  return vaddvq_s32((int32x4_t)v);
#else
  int32_t sum = 0;
  for (size_t i = 0; i < kIntLanes; ++i) sum += v[i];
  return sum;
#endif
}
// Returns the low byte of each lane.
inline LaneCodes low_bytes(LaneInts v) {
  return __builtin_convertvector(v, LaneCodes);
}

#if defined(NPLORA_SIMD_AVX512)

inline LaneInts to_ints(Vec<float> v) {
  return (LaneInts)_mm512_cvtps_epi32(v.v);
}
inline LaneInts load_quads(const void* p) {
  LaneInts v;  // assembly, because GCC 12 stores the result of the load intrinsic on the stack
  __asm__("vmovdqu32 %1, %0" : "=v"(v) : "m"(*static_cast<const UnalignedInts*>(p)));
  return v;
}

#if defined(NPLORA_SIMD_VNNI)

inline constexpr uint8_t kCodeOffset = 128;
#define NPLORA_DOT "vpdpbusd "
#define NPLORA_IN "v"

#else

// The instruction vpmaddubsw multiplies unsigned bytes by signed bytes, so w * x is computed as |w| * (x
// times the sign of w). The sum of two products is at most 2 * 127 * 127, which fits into 16 bits.
inline constexpr uint8_t kCodeOffset = 0;
inline void dot_quads(LaneInts& sums, LaneInts w, LaneInts x) {
  const __m512i codes = (__m512i)w, with_sign = _mm512_mask_sub_epi8((__m512i)x, _mm512_movepi8_mask(codes),
                                                                     _mm512_setzero_si512(), (__m512i)x);
  sums += (LaneInts)_mm512_madd_epi16(_mm512_maddubs_epi16(_mm512_abs_epi8(codes), with_sign),
                                      _mm512_set1_epi16(1));
}

#endif

#elif defined(NPLORA_SIMD_AVX2)

inline LaneInts to_ints(Vec<float> v) {
  return (LaneInts)_mm256_cvtps_epi32(v.v);
}
inline LaneInts load_quads(const void* p) {
  LaneInts v;
  __asm__("vmovdqu %1, %0" : "=x"(v) : "m"(*static_cast<const UnalignedInts*>(p)));
  return v;
}

#if defined(NPLORA_SIMD_VNNI)

inline constexpr uint8_t kCodeOffset = 128;
#define NPLORA_DOT "%{vex%} vpdpbusd "
#define NPLORA_IN "x"

#else

inline constexpr uint8_t kCodeOffset = 0;
// Computes w * x as |w| * (x times the sign of w), because vpmaddubsw multiplies unsigned bytes by signed
// bytes.
inline void dot_quads(LaneInts& sums, LaneInts w, LaneInts x) {
  const __m256i codes = (__m256i)w, with_sign = _mm256_sign_epi8((__m256i)x, codes);
  sums += (LaneInts)_mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(codes), with_sign),
                                      _mm256_set1_epi16(1));
}

#endif

#elif defined(NPLORA_SIMD_NEON)

inline LaneInts to_ints(Vec<float> v) {
  return (LaneInts)vcvtnq_s32_f32(v.v);
}
inline LaneInts load_quads(const void* p) {
  return (LaneInts)vld1q_s32(static_cast<const int32_t*>(p));
}

inline constexpr uint8_t kCodeOffset = 0;
inline void dot_quads(LaneInts& sums, LaneInts w, LaneInts x) {
  const auto a = (int8x16_t)w, b = (int8x16_t)x;
#if defined(NPLORA_SIMD_DOTPROD)
  sums = (LaneInts)vdotq_s32((int32x4_t)sums, a, b);
#else  // the sum of two products is at most 2 * 127 * 127, which fits into 16 bits
  const int16x8_t neighbours = vpaddq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)), vmull_high_s8(a, b));
  sums = (LaneInts)vpadalq_s16((int32x4_t)sums, neighbours);
#endif
}

#else

// After 1.5 * 2^23 is added to a float, the low bits of the sum hold the float rounded to an integer.
inline LaneInts to_ints(Vec<float> v) {
  constexpr float kShift = 0x1.8p23f;
  __asm__("" : "+m"(v.v));  // prevents the compiler from fusing an earlier multiplication with this addition
  return (LaneInts)(v.v + kShift) - __builtin_bit_cast(int32_t, kShift);
}
inline LaneInts load_quads(const void* p) {
  return bits_at<LaneInts>(static_cast<const char*>(p));
}

inline constexpr uint8_t kCodeOffset = 0;
inline void dot_quads(LaneInts& sums, LaneInts w, LaneInts x) {
  int8_t a[4 * kIntLanes], b[4 * kIntLanes];
  __builtin_memcpy(a, &w, sizeof a);
  __builtin_memcpy(b, &x, sizeof b);
  for (size_t j = 0; j < 4 * kIntLanes; ++j) sums[j / 4] += a[j] * b[j];
}

#endif

#if defined(NPLORA_SIMD_VNNI)
// One asm statement computes the products for all vectors. With the intrinsic _mm512_dpbusd_epi32, GCC 12
// copies the sums to other registers and to the stack, and the speed halves. With one asm statement for each
// vector, GCC 12 still copies some sums.
template <size_t kVectors>
[[gnu::always_inline]] inline void dot_vectors(LaneInts (&s)[kVectors], const LaneInts (&w)[kVectors],
                                               LaneInts x) {
  if constexpr (kVectors == 1)
    __asm__(NPLORA_DOT "%2, %1, %0" : "+&" NPLORA_IN(s[0]) : NPLORA_IN(w[0]), NPLORA_IN(x));
  else if constexpr (kVectors == 2)
    __asm__(NPLORA_DOT "%4, %2, %0\n\t" NPLORA_DOT "%4, %3, %1"
            : "+&" NPLORA_IN(s[0]), "+&" NPLORA_IN(s[1])
            : NPLORA_IN(w[0]), NPLORA_IN(w[1]), NPLORA_IN(x));
  else {
    static_assert(kVectors == 3);
    __asm__(NPLORA_DOT "%6, %3, %0\n\t" NPLORA_DOT "%6, %4, %1\n\t" NPLORA_DOT "%6, %5, %2"
            : "+&" NPLORA_IN(s[0]), "+&" NPLORA_IN(s[1]), "+&" NPLORA_IN(s[2])
            : NPLORA_IN(w[0]), NPLORA_IN(w[1]), NPLORA_IN(w[2]), NPLORA_IN(x));
  }
}
#undef NPLORA_DOT
#undef NPLORA_IN
#else
template <size_t kVectors>
[[gnu::always_inline]] inline void dot_vectors(LaneInts (&s)[kVectors], const LaneInts (&w)[kVectors],
                                               LaneInts x) {
#pragma GCC unroll 8
  for (size_t v = 0; v < kVectors; ++v) dot_quads(s[v], w[v], x);
}
#endif

}  // namespace nplora::kernels::NPLORA_ISA
