// Vectors with one lane of 32 bits for each of kLaneRows rows of W, for x86-64 only. A vector fills a whole
// register, and consists of kLaneParts parts of 128 bits. Part p holds the lanes of rows 4p to 4p + 3. Only
// kernel units may include this file (see vec.h).
//
//   `join_parts(parts)` makes a vector whose part p is `parts[p]`. `first_halves(s)` makes a vector whose
//     part p holds the first 16 bytes of the sub-block `s[p]`. `last_halves(s)` does the same with the last
//     16 bytes.
//   `transpose_parts(v)` transposes kLaneParts matrices of 4 x 4 lanes. Row k of matrix p is part p of the
//     vector v[k].
//   `dot_lanes<kLargest>(u, x)` multiplies the bytes of the eight vectors u[k] by the bytes of the eight
//     vectors x(k), and returns the sum of the 32 products of each lane. The bytes of u[k] are unsigned, and
//     at most kLargest. The bytes of x(k) are from -127 to 127. Without VNNI, kLargest must be at most 128.
//   `broadcast_four(p)` loads four bytes into each lane.
//   `magnitudes(b)` returns the magnitudes of signed bytes. `set_signs(signs, b)` stores the signs of the
//     bytes b in `signs`. For a byte that is 0, the stored sign does not matter, because the byte is later
//     multiplied as a magnitude of 0. `with_signs(x, signs)` multiplies each byte of `x` by the stored sign
//     of the byte in the same place.
//   `to_floats(sums)` converts integers to floats, lane by lane. `floats_of_halves(lanes)` converts the
//     float16 numbers in the low halves of the lanes to floats.
#pragma once

#include "simd/vec_sub_blocks.h"

#if defined(NPLORA_SIMD_AVX512) || defined(NPLORA_SIMD_AVX2)

namespace nplora::kernels::NPLORA_ISA {

#if defined(NPLORA_SIMD_AVX512)
inline constexpr size_t kLaneRows = 16;
#else
inline constexpr size_t kLaneRows = 8;
#endif
inline constexpr size_t kLaneParts = kLaneRows / 4;

typedef uint8_t LaneBytes __attribute__((vector_size(4 * kLaneRows)));
typedef int16_t LanePairs __attribute__((vector_size(4 * kLaneRows)));  // 16-bit sums of products
typedef int32_t LaneInts __attribute__((vector_size(4 * kLaneRows)));
typedef uint32_t LaneBits __attribute__((vector_size(4 * kLaneRows)));
typedef float LaneFloats __attribute__((vector_size(4 * kLaneRows)));

inline LaneBytes broadcast_four(const void* p) {
  uint32_t four;
  __builtin_memcpy(&four, p, sizeof four);
  return (LaneBytes)(LaneBits{} + four);
}

#if defined(NPLORA_SIMD_AVX512)

inline LaneFloats to_floats(LaneInts sums) {
  return __builtin_convertvector(sums, LaneFloats);
}

inline LaneBytes join_parts(const Bytes (&parts)[kLaneParts]) {
  return (LaneBytes)_mm512_inserti64x4(_mm512_castsi256_si512((__m256i)join(parts[0], parts[1])),
                                       (__m256i)join(parts[2], parts[3]), 1);
}
inline LaneBytes first_halves(const SubBlock (&s)[kLaneParts]) {
  const __m256i low = _mm256_permute2x128_si256((__m256i)s[0], (__m256i)s[1], 0x20),
                high = _mm256_permute2x128_si256((__m256i)s[2], (__m256i)s[3], 0x20);
  return (LaneBytes)_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}
inline LaneBytes last_halves(const SubBlock (&s)[kLaneParts]) {
  const __m256i low = _mm256_permute2x128_si256((__m256i)s[0], (__m256i)s[1], 0x31),
                high = _mm256_permute2x128_si256((__m256i)s[2], (__m256i)s[3], 0x31);
  return (LaneBytes)_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

inline void transpose_parts(LaneBytes (&v)[4]) {
  const auto at = [&](size_t i) { return (__m512i)v[i]; };
  const __m512i a = _mm512_unpacklo_epi32(at(0), at(1)), b = _mm512_unpacklo_epi32(at(2), at(3)),
                c = _mm512_unpackhi_epi32(at(0), at(1)), d = _mm512_unpackhi_epi32(at(2), at(3));
  v[0] = (LaneBytes)_mm512_unpacklo_epi64(a, b);
  v[1] = (LaneBytes)_mm512_unpackhi_epi64(a, b);
  v[2] = (LaneBytes)_mm512_unpacklo_epi64(c, d);
  v[3] = (LaneBytes)_mm512_unpackhi_epi64(c, d);
}

#if defined(NPLORA_SIMD_VNNI)
inline LaneInts add_products(LaneInts sums, LaneBytes u, LaneBytes x) {
  return (LaneInts)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)u, (__m512i)x);
}
#else
inline LanePairs dot_pairs(LaneBytes u, LaneBytes x) {
  return (LanePairs)_mm512_maddubs_epi16((__m512i)u, (__m512i)x);
}
inline LaneInts sums_of(LanePairs pairs) {
  return (LaneInts)_mm512_madd_epi16((__m512i)pairs, _mm512_set1_epi16(1));
}
#endif

// The signs of bytes, as one bit for each byte: 1 if the byte is negative.
using LaneSigns = __mmask64;
[[gnu::always_inline]] inline void set_signs(LaneSigns& signs, LaneBytes b) {
  signs = _mm512_movepi8_mask((__m512i)b);
}
inline LaneBytes with_signs(LaneBytes x, const LaneSigns& signs) {
  return (LaneBytes)_mm512_mask_sub_epi8((__m512i)x, signs, _mm512_setzero_si512(), (__m512i)x);
}
inline LaneBytes magnitudes(LaneBytes b) {
  return (LaneBytes)_mm512_abs_epi8((__m512i)b);
}

inline LaneFloats floats_of_halves(LaneBits halves) {
  return (LaneFloats)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)halves));
}

#else

inline LaneBytes join_parts(const Bytes (&parts)[kLaneParts]) {
  return join(parts[0], parts[1]);
}
inline LaneBytes first_halves(const SubBlock (&s)[kLaneParts]) {
  return (LaneBytes)_mm256_permute2x128_si256((__m256i)s[0], (__m256i)s[1], 0x20);
}
inline LaneBytes last_halves(const SubBlock (&s)[kLaneParts]) {
  return (LaneBytes)_mm256_permute2x128_si256((__m256i)s[0], (__m256i)s[1], 0x31);
}

inline void transpose_parts(LaneBytes (&v)[4]) {
  const auto at = [&](size_t i) { return (__m256i)v[i]; };
  const __m256i a = _mm256_unpacklo_epi32(at(0), at(1)), b = _mm256_unpacklo_epi32(at(2), at(3)),
                c = _mm256_unpackhi_epi32(at(0), at(1)), d = _mm256_unpackhi_epi32(at(2), at(3));
  v[0] = (LaneBytes)_mm256_unpacklo_epi64(a, b);
  v[1] = (LaneBytes)_mm256_unpackhi_epi64(a, b);
  v[2] = (LaneBytes)_mm256_unpacklo_epi64(c, d);
  v[3] = (LaneBytes)_mm256_unpackhi_epi64(c, d);
}

#if defined(NPLORA_SIMD_VNNI)
inline LaneInts add_products(LaneInts sums, LaneBytes u, LaneBytes x) {
  return (LaneInts)_mm256_dpbusd_epi32((__m256i)sums, (__m256i)u, (__m256i)x);
}
#else
inline LanePairs dot_pairs(LaneBytes u, LaneBytes x) {
  return (LanePairs)_mm256_maddubs_epi16((__m256i)u, (__m256i)x);
}
inline LaneInts sums_of(LanePairs pairs) {
  return (LaneInts)_mm256_madd_epi16((__m256i)pairs, _mm256_set1_epi16(1));
}
#endif

// The signs of bytes. LaneSigns stores the bytes themselves, because the instruction vpsignb reads the signs
// from bytes. `set_signs` writes the bytes to memory, so that the registers are free for the magnitudes.
struct LaneSigns {
  LaneBytes bytes;
};
[[gnu::always_inline]] inline void set_signs(LaneSigns& signs, LaneBytes b) {
  signs.bytes = b;
  asm("" : "+m"(signs.bytes));
}
inline LaneBytes with_signs(LaneBytes x, const LaneSigns& signs) {
  return (LaneBytes)_mm256_sign_epi8((__m256i)x, (__m256i)signs.bytes);
}
inline LaneBytes magnitudes(LaneBytes b) {
  return (LaneBytes)_mm256_abs_epi8((__m256i)b);
}

inline LaneFloats floats_of_halves(LaneBits halves) {
  const auto low = (__m256i)(halves & 0xFFFF);
  return (LaneFloats)_mm256_cvtph_ps(
      _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1)));
}

#endif

template <size_t kLargest, class X>
[[gnu::always_inline]] inline LaneInts dot_lanes(const LaneBytes (&u)[8], const X& x) {
  LaneInts sums[2] = {};
#if defined(NPLORA_SIMD_VNNI)
#pragma GCC unroll 8
  for (size_t k = 0; k < 8; ++k) sums[k % 2] = add_products(sums[k % 2], u[k], x(k));
#else
  // The largest sum of two products is 2 * 127 * kLargest. If the total of several sums still fits into 16
  // bits, the sums are added before they are widened to 32 bits, because one widening is cheaper than
  // several.
  constexpr size_t kFit = 32767 / (2 * 127 * kLargest);
  static_assert(kFit > 0, "kLargestCode of Codes<Block> must be the largest code of the format");
  constexpr size_t kTogether = kFit >= 8 ? 8 : kFit >= 4 ? 4 : kFit >= 2 ? 2 : 1;
#pragma GCC unroll 8
  for (size_t k = 0; k < 8; k += kTogether) {
    LanePairs pairs = dot_pairs(u[k], x(k));
#pragma GCC unroll 8
    for (size_t i = k + 1; i < k + kTogether; ++i) pairs += dot_pairs(u[i], x(i));
    sums[k / kTogether % 2] += sums_of(pairs);
  }
#endif
  return sums[0] + sums[1];
}

}  // namespace nplora::kernels::NPLORA_ISA

#endif
