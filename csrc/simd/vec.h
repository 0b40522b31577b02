// Vec<float> and Vec<double>: vector registers, with the same functions for every instruction set.
//
// A kernel unit is one of the files kernels/isa_*.cpp. Each kernel unit defines NPLORA_ISA, the namespace of
// all its code, and one macro NPLORA_SIMD_*, which selects the registers. Only kernel units may include this
// file. If two kernel units shared an inline function, the linker would keep only one version of this
// function. If this version used AVX-512, the other kernel unit would crash on a machine without AVX-512. For
// the same reason, kernel units use no templates of the standard library: the linker would keep only one
// version of each template function.
//
//   `zero()`, `load(p)` and `store(p)` work on all lanes of a vector.
//   `broadcast(x)` copies x to all lanes. The result of `broadcast` is a vector, or another type that `fma`
//     accepts as its second argument.
//   `load_partial(p, n)` and `store_partial(p, n)` access only the first n lanes. `load_partial` sets the
//     other lanes to 0.
//   `load_group<n>(p)` loads n elements and repeats them until all lanes are full.
//   `Vec<Bf16Pair>::pair_rows(first, second)` pairs each bfloat16 value of the row `first` with the value in
//     the same column of the row `second`.
//   `fma(a, b, c)` returns a * b + c. `a` and `c` are vectors, and `b` is a vector or a result of
//     `broadcast`. Or all three are floats.
//   `max(a, b)` and `min(a, b)` return NaN if b is NaN. `max`, `min` and the operators -, * and / exist only
//     for vectors of floats.
//   `times_power_of_two(a, n)` returns a * 2^n for whole numbers n from -252 to 254, and NaN if `a` is NaN.
//     `times_power_of_two` exists only for vectors of floats. A result is exact unless it is subnormal or too
//     large for a float.
//   `transpose(Vec (&)[kLanes])` transposes a square block of elements. Each vector is a row of the block.
//   `add_neighbours(a, b)` adds lanes 2i and 2i + 1 of each vector. The first half of the result holds the
//     sums of a, and the second half holds the sums of b.
//   `keep(v)` makes the compiler keep the loaded vector v in a register.
//   `in_order(v)` makes the compiler keep the order of these calls, and calculate `v` before the call. For
//     generic vectors, `in_order` does nothing.
//   `part<0>(a)` and `part<1>(a)` are the first and the second numbers of the pairs in `a`. If kParts<E> is
//     2, a kernel calculates fma(a, b, c) in two steps, one for each part of `a` and `b`. The registers of
//     AVX2 hold the accumulators of a tile and one part of the operands, but not both parts. If kParts<E> is
//     1, part<0>(a) is `a`.
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

// Keeps the pointer `p` in a register. GCC would otherwise compute the address again for each use.
template <class T>
inline void keep(T*& p) {
  __asm__("" : "+r"(p));
}

// Returns an object of type Bits that is a copy of the bytes at `p`.
template <class Bits, class T>
inline Bits bits_at(const T* p) {
  Bits bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return bits;
}

template <class E>
inline constexpr size_t kParts = 1;

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

// The compilers' vector extensions provide the operators -, * and / for the registers of every instruction
// set.
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
template <size_t kPart>
inline auto part(Vec<Bf16Pair> a) {
  if constexpr (kParts<Bf16Pair> == 1)
    return a;
  else
    return kPart == 0 ? first(a) : second(a);
}
#endif

template <size_t kPart, class Operand>
inline Operand part(Operand a) {
  return a;
}

}  // namespace nplora::kernels::NPLORA_ISA
