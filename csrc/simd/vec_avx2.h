// Vectors of 8 floats or 4 doubles in one AVX register, with FMA3. Only vec.h includes this file, inside the
// namespace NPLORA_ISA.

// The mask for the first n of 8 words begins at kMaskWords[8 - n]: n words of -1, then 8 - n words of 0.
alignas(32) inline constexpr int32_t kMaskWords[16] = {-1, -1, -1, -1, -1, -1, -1, -1,
                                                       0,  0,  0,  0,  0,  0,  0,  0};

template <>
struct Vec<float> {
  static constexpr size_t kLanes = 8;
  __m256 v;

  static Vec zero() { return {_mm256_setzero_ps()}; }
  static Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load_partial(const float* p, size_t n) { return {_mm256_maskload_ps(p, mask(n))}; }
  static Vec load(const Bf16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return widen(bits);
  }
  static Vec widen(__m128i bits) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
  }
  template <size_t kCount>
  static Vec load_group(const float* p) {
    if constexpr (kCount == 1) return broadcast(*p);
    if constexpr (kCount == 2) return {_mm256_castpd_ps(_mm256_set1_pd(bits_at<double>(p)))};
    if constexpr (kCount == 4) return {_mm256_broadcast_ps(reinterpret_cast<const __m128*>(p))};
    if constexpr (kCount == 8) return load(p);
  }
  static Vec load_partial(const Bf16* p, size_t n) {
    Bf16 t[kLanes] = {};
    for (size_t i = 0; i < n; ++i) t[i] = p[i];
    return load(t);
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store_partial(float* p, size_t n) const { _mm256_maskstore_ps(p, mask(n), v); }
  static __m256i mask(size_t n) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kMaskWords + 8 - n));
  }
};
inline Vec<float> operator+(Vec<float> a, Vec<float> b) {
  return {_mm256_add_ps(a.v, b.v)};
}
inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return {_mm256_fmadd_ps(a.v, b.v, c.v)};
}
inline float fma(float a, float b, float c) {
  return __builtin_fmaf(a, b, c);
}
inline Vec<float> max(Vec<float> a, Vec<float> b) {
  return {_mm256_max_ps(a.v, b.v)};
}
inline Vec<float> min(Vec<float> a, Vec<float> b) {
  return {_mm256_min_ps(a.v, b.v)};
}
inline Vec<float> power_of_two(__m256i n) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23))};
}
inline Vec<float> times_power_of_two(Vec<float> a, Vec<float> n) {
  const __m256i whole = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(whole, 1);
  return {a.v * power_of_two(half).v * power_of_two(_mm256_sub_epi32(whole, half)).v};
}

template <>
struct Vec<double> {
  static constexpr size_t kLanes = 4;
  __m256d v;

  static Vec zero() { return {_mm256_setzero_pd()}; }
  static Vec broadcast(double x) { return {_mm256_set1_pd(x)}; }
  static Vec load(const double* p) { return {_mm256_loadu_pd(p)}; }
  static Vec load_partial(const double* p, size_t n) { return {_mm256_maskload_pd(p, mask(n))}; }
  template <size_t kCount>
  static Vec load_group(const double* p) {
    if constexpr (kCount == 1) return broadcast(*p);
    if constexpr (kCount == 2) return {_mm256_broadcast_pd(reinterpret_cast<const __m128d*>(p))};
    if constexpr (kCount == 4) return load(p);
  }
  void store(double* p) const { _mm256_storeu_pd(p, v); }
  void store_partial(double* p, size_t n) const { _mm256_maskstore_pd(p, mask(n), v); }
  static __m256i mask(size_t n) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kMaskWords + 8 - 2 * n));
  }
};
inline Vec<double> operator+(Vec<double> a, Vec<double> b) {
  return {_mm256_add_pd(a.v, b.v)};
}
inline Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return {_mm256_fmadd_pd(a.v, b.v, c.v)};
}

template <class T>
inline void in_order(Vec<T>& v) {
  __asm__ volatile("" : "+x"(v.v));
}

template <>
inline constexpr size_t kParts<Bf16Pair> = 2;
template <>
struct Vec<Bf16Pair> {
  static constexpr size_t kLanes = 8;
  __m256i v;

  // Without `in_order`, Clang would shift `x` before it copies `x` to all lanes, and use more instructions.
  static Vec broadcast(Bf16Pair x) {
    Vec all{_mm256_set1_epi32(static_cast<int>(x))};
    in_order(all);
    return all;
  }
  static Vec load(const Bf16Pair* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
  static Vec load_partial(const Bf16Pair* p, size_t n) {
    return {_mm256_maskload_epi32(reinterpret_cast<const int*>(p), Vec<float>::mask(n))};
  }
  static Vec pair_rows(Vec<Bf16> first, Vec<Bf16> second);
};

template <>
struct Vec<Bf16> {
  static constexpr size_t kLanes = 8;
  __m128i v;

  static Vec zero() { return {_mm_setzero_si128()}; }
  static Vec load(const Bf16* p) { return {bits_at<__m128i>(p)}; }
  static Vec load_partial(const Bf16* p, size_t n) {
    Bf16 t[kLanes] = {};
    for (size_t i = 0; i < n; ++i) t[i] = p[i];
    return load(t);
  }
};
inline Vec<Bf16Pair> Vec<Bf16Pair>::pair_rows(Vec<Bf16> first, Vec<Bf16> second) {
  return {_mm256_or_si256(_mm256_cvtepu16_epi32(first.v),
                          _mm256_slli_epi32(_mm256_cvtepu16_epi32(second.v), 16))};
}
inline Vec<float> first(Vec<Bf16Pair> a) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(a.v, 16))};
}
inline Vec<float> second(Vec<Bf16Pair> a) {
  return {_mm256_castsi256_ps(_mm256_and_si256(a.v, _mm256_set1_epi32(-65536)))};
}

inline Vec<float> add_neighbours(Vec<float> a, Vec<float> b) {
  // The instruction hadd returns the sums in this order: low half of `a`, low half of `b`, high half of `a`,
  // high half of `b`. The permutation then puts all sums of `a` before the sums of `b`.
  const __m256d halves = _mm256_castps_pd(_mm256_hadd_ps(a.v, b.v));
  return {_mm256_castpd_ps(_mm256_permute4x64_pd(halves, 0xd8))};
}
inline Vec<double> add_neighbours(Vec<double> a, Vec<double> b) {
  return {_mm256_permute4x64_pd(_mm256_hadd_pd(a.v, b.v), 0xd8)};
}

// Transposes an 8 x 8 block in 8 registers. The steps rearrange 32-bit lanes, then 64-bit lanes, then 128-bit
// halves.
inline void transpose(Vec<float> (&r)[8]) {
  __m256 t[8], u[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i].v, r[i + 1].v);
    t[i + 1] = _mm256_unpackhi_ps(r[i].v, r[i + 1].v);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    r[j].v = _mm256_permute2f128_ps(u[j], u[4 + j], 0x20);
    r[4 + j].v = _mm256_permute2f128_ps(u[j], u[4 + j], 0x31);
  }
}

inline void transpose(Vec<double> (&r)[4]) {
  const __m256d t0 = _mm256_unpacklo_pd(r[0].v, r[1].v), t1 = _mm256_unpackhi_pd(r[0].v, r[1].v);
  const __m256d t2 = _mm256_unpacklo_pd(r[2].v, r[3].v), t3 = _mm256_unpackhi_pd(r[2].v, r[3].v);
  r[0].v = _mm256_permute2f128_pd(t0, t2, 0x20);
  r[1].v = _mm256_permute2f128_pd(t1, t3, 0x20);
  r[2].v = _mm256_permute2f128_pd(t0, t2, 0x31);
  r[3].v = _mm256_permute2f128_pd(t1, t3, 0x31);
}

// Keeps `v` in a register. GCC would otherwise load `v` from memory again for each use.
template <class T>
inline void keep(Vec<T>& v) {
  __asm__("" : "+x"(v.v));
}
