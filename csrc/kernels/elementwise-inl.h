// Optimiser steps, sums of squares, dropout and 16-bit conversions. These kernels are plain loops that the
// compiler vectorises for each instruction set.

#include "kernels/philox-inl.h"

namespace nplora::kernels::NPLORA_ISA {

// Memory bandwidth limits the speed of optimiser steps. The code does not prefetch: on a Zen 4, the hardware
// prefetcher follows the four arrays of a step, and software prefetching made a step 20 % slower.

// One AdamW step for the parameters `p`, gradients `g` and moments `m` and `v`, which have n elements each.
// The gradients are first multiplied by grad_scale. In the formulas, b1 and b2 are beta1 and beta2, wd is the
// weight decay, and bias1 and bias2 are the bias corrections (see AdamWCoefficients). The step is:
//   m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g²;
//   p = p (1 - lr wd) - lr (m / bias1) / (sqrt(v / bias2) + eps)
template <class T>
void adamw(size_t n, T* __restrict p, const T* __restrict g, T* __restrict m, T* __restrict v,
           const AdamWCoefficients& k) {
  const T beta1 = T(k.beta1), beta2 = T(k.beta2), rest1 = T(1 - k.beta1), rest2 = T(1 - k.beta2),
          grad_scale = T(k.grad_scale), decay = T(1 - k.lr * k.weight_decay);
  // The numerator and the denominator of the update are both multiplied by sqrt(bias2). Each element then
  // needs one division instead of two.
  const double root_bias2 = __builtin_sqrt(k.bias2);
  const T step = T(k.lr / k.bias1 * root_bias2), eps = T(k.eps * root_bias2);
  for (size_t i = 0; i < n; ++i) {
    const T gi = grad_scale * g[i];
    const T mi = beta1 * m[i] + rest1 * gi;
    const T vi = beta2 * v[i] + rest2 * gi * gi;
    m[i] = mi;
    v[i] = vi;
    const T root = sizeof(T) == 4 ? T(__builtin_sqrtf(float(vi))) : T(__builtin_sqrt(double(vi)));
    p[i] = decay * p[i] - step * mi / (root + eps);
  }
}

// One SGD step for the parameters `p` with gradients `g`, which have n elements each. The gradients are first
// multiplied by grad_scale. In the formulas, wd is the weight decay. The step is:
//   d = g + wd p;  buf = momentum * buf + d;
//   p = p - lr buf, or p = p - lr (d + momentum * buf) if `nesterov` is set
// Without momentum, `buf` is null, and the step is p = p - lr d.
template <class T>
void sgd_plain(size_t n, T* __restrict p, const T* __restrict g, const SgdCoefficients& k) {
  const T lr = T(k.lr), decay = T(k.weight_decay), grad_scale = T(k.grad_scale);
  for (size_t i = 0; i < n; ++i) p[i] -= lr * (grad_scale * g[i] + decay * p[i]);
}

template <bool kNesterov, class T>
void sgd_momentum(size_t n, T* __restrict p, const T* __restrict g, T* __restrict buf,
                  const SgdCoefficients& k) {
  const T lr = T(k.lr), momentum = T(k.momentum), decay = T(k.weight_decay), grad_scale = T(k.grad_scale);
  for (size_t i = 0; i < n; ++i) {
    const T d = grad_scale * g[i] + decay * p[i];
    buf[i] = momentum * buf[i] + d;
    p[i] -= lr * (kNesterov ? d + momentum * buf[i] : buf[i]);
  }
}

template <class T>
void sgd(size_t n, T* p, const T* g, T* buf, const SgdCoefficients& k) {
  if (!buf)
    sgd_plain(n, p, g, k);
  else if (k.nesterov)
    sgd_momentum<true>(n, p, g, buf, k);
  else
    sgd_momentum<false>(n, p, g, buf, k);
}

// Returns the sum of the squares of x (n). The function keeps sixteen partial sums: the square of element i
// is added to partial sum i % 16. At the end, the partial sums are added in pairs. The order of the additions
// is the same on every instruction set.
template <class T>
double sum_of_squares(size_t n, const T* x) {
  double sums[16] = {};
  size_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (size_t j = 0; j < 16; ++j) sums[j] += double(x[i + j]) * double(x[i + j]);
  for (size_t j = 0; i < n; ++i, ++j) sums[j] += double(x[i]) * double(x[i]);
  for (size_t half = 8; half > 0; half /= 2)
    for (size_t j = 0; j < half; ++j) sums[j] += sums[j + half];
  return sums[0];
}

// Calls `body(i, word)` for each i < n, where `word` is a random 32-bit number. Philox makes four words from
// each counter. Element i gets word (first + i) % 4 of the counter floor((first + i) / 4).
template <class Body>
inline void for_words(size_t n, uint64_t seed, uint64_t first, const Body& body) {
  constexpr size_t kElements = 4 * kPhiloxBlocks;
  uint32_t words[4][kPhiloxBlocks];
  for (size_t i = 0; i < n;) {
    const uint64_t element = first + i;
    philox(seed, element / 4, words);
    const size_t skip = size_t(element % 4), count = smaller(kElements - skip, n - i);
    for (size_t j = 0; j < count; ++j) body(i + j, words[(skip + j) % 4][(skip + j) / 4]);
    i += count;
  }
}

// Dropout: out[i] is 0 if the random word of element i is below `threshold`, else x[i] * factor.
template <class T>
void dropout(size_t n, uint64_t seed, uint64_t first, uint32_t threshold, T factor, const T* x, T* out) {
  for_words(n, seed, first,
            [=](size_t i, uint32_t word) { out[i] = word < threshold ? T(0) : x[i] * factor; });
}

// ---- stochastic rounding ----

// Rounds the magnitude of a float stochastically to a format that lacks the last `dropped` bits of a float.
// `magnitude` and `largest` are the bits of floats. The function adds the first `dropped` bits of the random
// number `word` to the last `dropped` bits of the magnitude, then sets these last bits to zero. If the
// addition carries into the exponent, the result is still correct. `largest` is the largest finite number of
// the format. NaN and magnitudes of at least `largest` do not change.
inline uint32_t dither_bits(uint32_t magnitude, uint32_t word, int dropped, uint32_t largest) {
  const uint32_t dithered = (magnitude + (word >> (32 - dropped))) >> dropped << dropped;
  return magnitude >= largest ? magnitude : dithered;
}

inline void dither_bfloat16(size_t n, uint64_t seed, uint64_t first, float* x) {
  for_words(n, seed, first, [=](size_t i, uint32_t word) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, x[i]), sign = bits & 0x80000000u;
    x[i] = __builtin_bit_cast(float, sign | dither_bits(bits ^ sign, word, 16, 0x7F7F0000u));
  });
}

inline void dither_float16(size_t n, uint64_t seed, uint64_t first, float* x) {
  for_words(n, seed, first, [=](size_t i, uint32_t word) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, x[i]), sign = bits & 0x80000000u,
                   magnitude = bits ^ sign;
    const uint32_t normal = dither_bits(magnitude, word, 13, 0x477FE000u);
    // Below 2^-14, neighbouring float16 numbers are 2^-24 apart. So the magnitude of x[i] is converted to
    // units of 2^-24 and split into the integer `whole` and a fraction. The code adds a random fraction to
    // this fraction. If the sum is at least 1, the magnitude is rounded up, else down.
    const bool is_subnormal = magnitude < 0x38800000u;
    const float units = is_subnormal ? __builtin_bit_cast(float, magnitude) * 0x1p24f : 0.0f;
    const int32_t whole = int32_t(units), part = int32_t((units - float(whole)) * 0x1p24f);
    const float subnormal = float(whole + (part + int32_t(word >> 8) >= (1 << 24))) * 0x1p-24f;
    x[i] =
        __builtin_bit_cast(float, sign | (is_subnormal ? __builtin_bit_cast(uint32_t, subnormal) : normal));
  });
}

// ---- bfloat16, which is the upper half of a float ----

inline void widen_bfloat16(size_t n, const uint16_t* from, float* to) {
  for (size_t i = 0; i < n; ++i) to[i] = __builtin_bit_cast(float, uint32_t(from[i]) << 16);
}

// Returns the bits of `x` rounded to the nearest bfloat16, with ties to even. A NaN is not rounded, because
// rounding could turn the NaN into infinity or zero. Instead, the function keeps the upper bits of the NaN
// and makes the NaN quiet.
inline uint32_t bfloat16_bits(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40u;
  return (bits & 0x7FFFFFFFu) > 0x7F800000u ? quiet : rounded;
}

inline Bf16Pair bfloat16_pair(float first, float second) {
  return Bf16Pair(bfloat16_bits(first) | bfloat16_bits(second) << 16);
}

#if defined(NPLORA_SIMD_AVX512) && defined(NPLORA_SIMD_BF16)
// `narrowed` converts two vectors of floats to bfloat16 in one instruction. The first vector becomes the low
// half of the result. The instruction gives the same bits as bfloat16_bits, except for subnormal numbers.
// `can_narrow` returns true if neither vector has a subnormal number. `subnormals` returns a mask of the
// lanes with subnormal numbers. The code tests the bits instead of comparing the numbers: a comparison would
// see a subnormal number as 0 if the program has set the processor to treat subnormal numbers as 0.
inline __mmask16 subnormals(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  return _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x7FFFFF)) &
         _mm512_testn_epi32_mask(bits, _mm512_set1_epi32(0x7F800000));
}
inline bool can_narrow(__m512 a, __m512 b) {
  return (subnormals(a) | subnormals(b)) == 0;
}
inline __m512i narrowed(__m512 a, __m512 b) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a));
}
#endif

inline void narrow_bfloat16(size_t n, const float* from, uint16_t* to) {
#if defined(NPLORA_SIMD_AVX512) && defined(NPLORA_SIMD_BF16)
  for (; n >= 32; n -= 32, from += 32, to += 32) {
    const __m512 a = _mm512_loadu_ps(from), b = _mm512_loadu_ps(from + 16);
    if (can_narrow(a, b))
      _mm512_storeu_si512(to, narrowed(a, b));
    else
      for (size_t i = 0; i < 32; ++i) to[i] = uint16_t(bfloat16_bits(from[i]));
  }
#endif
  for (size_t i = 0; i < n; ++i) to[i] = uint16_t(bfloat16_bits(from[i]));
}

inline void pair_rows(size_t rows, size_t cols, const float* x, size_t x_stride, Bf16Pair* out) {
#if defined(NPLORA_SIMD_AVX512) && defined(NPLORA_SIMD_BF16)
  // The hardware prefetcher cannot follow all rows of `x`, so while the code reads two rows, it prefetches
  // two later rows. The prefetch distance is about kFetchAhead bytes, but at least two rows. The code divides
  // by cols + 1 instead of `cols`, because `cols` may be 0.
  const size_t ahead = (kFetchAhead / sizeof(float) / (cols + 1) + 2) * x_stride;
#endif
  for (; rows >= 2; rows -= 2, x += 2 * x_stride, out += cols) {
    size_t c = 0;
#if defined(NPLORA_SIMD_AVX512) && defined(NPLORA_SIMD_BF16)
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23,
                                           7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    for (; c + 16 <= cols; c += 16) {
      __builtin_prefetch(x + ahead + c);
      __builtin_prefetch(x + ahead + x_stride + c);
      const __m512 a = _mm512_loadu_ps(x + c), b = _mm512_loadu_ps(x + x_stride + c);
      if (can_narrow(a, b))
        _mm512_storeu_si512(out + c, _mm512_permutexvar_epi16(order, narrowed(a, b)));
      else
        for (size_t i = c; i < c + 16; ++i) out[i] = bfloat16_pair(x[i], x[x_stride + i]);
    }
#endif
    for (; c < cols; ++c) out[c] = bfloat16_pair(x[c], x[x_stride + c]);
  }
  for (size_t c = 0; rows == 1 && c < cols; ++c) out[c] = Bf16Pair(bfloat16_bits(x[c]));
}

inline void pair_bits(size_t rows, size_t cols, const uint16_t* x, size_t x_stride, Bf16Pair* out) {
  for (; rows >= 2; rows -= 2, x += 2 * x_stride, out += cols)
    for (size_t c = 0; c < cols; ++c) out[c] = Bf16Pair(x[c] | uint32_t(x[x_stride + c]) << 16);
  for (size_t c = 0; rows == 1 && c < cols; ++c) out[c] = Bf16Pair(x[c]);
}

// ---- float16 conversions for instruction sets that have none ----

// A program may have set the processor to treat subnormal floats as 0. Therefore, these conversions compute
// no intermediate value that is a subnormal float.
inline void widen_float16_portable(size_t n, const uint16_t* from, float* to) {
  for (size_t i = 0; i < n; ++i) {
    const uint32_t sign = uint32_t(from[i] & 0x8000u) << 16, value = uint32_t(from[i] & 0x7FFFu) << 13;
    const uint32_t normal = value + (112u << 23);  // changes the exponent's bias from 15 to 127
    const uint32_t subnormal = __builtin_bit_cast(uint32_t, float(from[i] & 0x3FFu) * 0x1p-24f);
    const uint32_t special = value | 0x7F800000u;  // Inf and NaN keep their fraction bits
    const uint32_t exponent = from[i] & 0x7C00u;
    to[i] = __builtin_bit_cast(float, sign | (exponent == 0x7C00u ? special
                                              : exponent == 0     ? subnormal
                                                                  : normal));
  }
}

inline void narrow_float16_portable(size_t n, const float* from, uint16_t* to) {
  for (size_t i = 0; i < n; ++i) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, from[i]), sign = (bits >> 16) & 0x8000u,
                   value = bits & 0x7FFFFFFFu;
    uint32_t half;
    if (value > 0x7F800000u) {  // NaN
      half = 0x7E00u | ((value >> 13) & 0x3FFu);
    } else if (value >= 0x477FF000u) {  // a magnitude of at least 65520 is rounded to infinity
      half = 0x7C00u;
    } else if (value < 0x38800000u) {
      // The float16 result is 0, subnormal or the smallest normal number. The code adds 0.5 to the magnitude.
      // The sum is a float from 0.5 to 1, so it is a multiple of 2^-24, like a subnormal float16. The
      // addition therefore rounds in the same way as a conversion to float16.
      half = __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, value) + 0.5f) - 0x3F000000u;
    } else {  // changes the exponent's bias from 127 to 15 and rounds to nearest, ties to even
      half = (value - 0x38000000u + 0xFFFu + ((value >> 13) & 1u)) >> 13;
    }
    to[i] = uint16_t(sign | half);
  }
}

#if defined(NPLORA_SIMD_AVX2) || defined(NPLORA_SIMD_AVX512)

inline void widen_float16(size_t n, const uint16_t* from, float* to) {
  size_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  widen_float16_portable(n - i, from + i, to + i);
}

inline void narrow_float16(size_t n, const float* from, uint16_t* to) {
  size_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(to + i),
        _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  narrow_float16_portable(n - i, from + i, to + i);
}

#elif defined(NPLORA_SIMD_NEON)

inline void widen_float16(size_t n, const uint16_t* from, float* to) {
  for (size_t i = 0; i < n; ++i) to[i] = float(__builtin_bit_cast(__fp16, from[i]));
}
inline void narrow_float16(size_t n, const float* from, uint16_t* to) {
  for (size_t i = 0; i < n; ++i) to[i] = __builtin_bit_cast(uint16_t, __fp16(from[i]));
}

#else

inline void widen_float16(size_t n, const uint16_t* from, float* to) {
  widen_float16_portable(n, from, to);
}
inline void narrow_float16(size_t n, const float* from, uint16_t* to) {
  narrow_float16_portable(n, from, to);
}

#endif

}  // namespace nplora::kernels::NPLORA_ISA
