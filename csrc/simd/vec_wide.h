// Vectors of unsigned 64-bit integers. Only kernel units may include this file (see vec.h).
//
//   `multiply_low(a, b)` multiplies the lower 32 bits of each lane of a and b. The products have 64 bits.
//   `store_low(v, p)` stores the lower 32 bits of each lane.
#pragma once

#include "simd/vec.h"

namespace nplora::kernels::NPLORA_ISA {

inline constexpr size_t kWideLanes = Vec<float>::kLanes / 2;
typedef uint64_t Wide __attribute__((vector_size(8 * kWideLanes)));
typedef uint32_t WideHalves __attribute__((vector_size(4 * kWideLanes)));

inline Wide multiply_low(Wide a, Wide b) {
#if defined(NPLORA_SIMD_AVX512)
  return (Wide)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(NPLORA_SIMD_AVX2)
  return (Wide)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(NPLORA_SIMD_NEON)
  return (Wide)vmull_u32(vmovn_u64((uint64x2_t)a), vmovn_u64((uint64x2_t)b));
#else
  return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
#endif
}

inline void store_low(Wide v, uint32_t* p) {
  const WideHalves halves = __builtin_convertvector(v, WideHalves);
  __builtin_memcpy(p, &halves, sizeof halves);
}

}  // namespace nplora::kernels::NPLORA_ISA
