// Vec<float> and Vec<double>: the registers of one instruction set behind one small interface.
//
// A kernel unit (isa_*.cpp) defines NPLORA_ISA, the namespace of all its code, and one NPLORA_SIMD_*, which
// picks the registers. No other unit may see this code. If two units shared an inline function, the linker
// could keep its AVX-512 version and crash an older machine. For this reason there are no std templates here
// and in kernels/.
//
//   zero, load, store
//   broadcast(x)   x in all lanes: a vector, or a type that fma takes as its b
//   load_partial, store_partial   touch only the first n lanes; the others read as 0
//   load_group<n>                 n elements, repeated until all lanes are full
//   pair_rows(first, second)      of Bf16Pair: pairs made of one vector of bfloat16 from each of two rows
//   fma(a, b, c) = a * b + c
//   for float: a - b, a * b, a / b; max(a, b), min(a, b)   NaN if b is NaN
//   times_power_of_two(a, n) = a * 2^n for whole n from -252 to 254, rounded once unless subnormal
//                              NaN if a is NaN
//   transpose(Vec (&)[kLanes])
//   add_neighbours(a, b)   the sums of neighbouring lanes of a, then the sums of neighbouring lanes of b
//   keep(v)   keeps a loaded v in its register
#pragma once

#if !defined(NPLORA_ISA)
#error "define NPLORA_ISA, the namespace of this instruction set, before including vec.h"
#endif

#include <stddef.h>
#include <stdint.h>

#if defined(NPLORA_SIMD_AVX512) || defined(NPLORA_SIMD_AVX2)
#include <immintrin.h>
#elif defined(NPLORA_SIMD_NEON)
#include <arm_neon.h>
#endif

namespace nplora::kernels::NPLORA_ISA {

constexpr size_t smaller(size_t a, size_t b) {
  return a < b ? a : b;
}

constexpr size_t ceil_div(size_t a, size_t b) {
  return (a + b - 1) / b;
}

// Keeps a pointer in its register. GCC would otherwise compute it again from its parts.
template <class T>
inline void keep(T*& p) {
  __asm__("" : "+r"(p));
}

// The bytes at p as an object of type Bits.
template <class Bits, class T>
inline Bits bits_at(const T* p) {
  Bits bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return bits;
}

#if defined(NPLORA_SIMD_GENERIC)
#include "simd/vec_generic.h"
#else
template <class T>
struct Vec;
#if defined(NPLORA_SIMD_AVX512)
#include "simd/vec_avx512.h"
#elif defined(NPLORA_SIMD_AVX2)
#include "simd/vec_avx2.h"
#elif defined(NPLORA_SIMD_NEON)
#include "simd/vec_neon.h"
#endif
#endif

// The vector extensions provide these operators for the registers of every instruction set.
inline Vec<float> operator-(Vec<float> a, Vec<float> b) {
  return {a.v - b.v};
}
inline Vec<float> operator*(Vec<float> a, Vec<float> b) {
  return {a.v * b.v};
}
inline Vec<float> operator/(Vec<float> a, Vec<float> b) {
  return {a.v / b.v};
}

#if !defined(NPLORA_SIMD_BF16)
inline Vec<float> fma(Vec<Bf16Pair> a, Vec<Bf16Pair> b, Vec<float> c) {
  return fma(second(a), second(b), fma(first(a), first(b), c));
}
#endif

}  // namespace nplora::kernels::NPLORA_ISA
