// Vectors of 16 floats or 8 doubles in one AVX-512 register. Only vec.h includes this file, inside the
// namespace NPLORA_ISA.
template <>
struct Vec<float> {
  static constexpr size_t kLanes = 16;
  __m512 v;

  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load_partial(const float* p, size_t n) { return {_mm512_maskz_loadu_ps(mask(n), p)}; }
  static Vec load(const Bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static Vec load_partial(const Bf16* p, size_t n) { return widen(_mm256_maskz_loadu_epi16(mask(n), p)); }
  static Vec widen(__m256i bits) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
  }
  template <size_t kCount>
  static Vec load_group(const float* p) {
    if constexpr (kCount == 1) return broadcast(*p);
    if constexpr (kCount == 2) return {_mm512_castpd_ps(_mm512_set1_pd(bits_at<double>(p)))};
    if constexpr (kCount == 4) return {_mm512_broadcast_f32x4(_mm_loadu_ps(p))};
    if constexpr (kCount == 8) return {_mm512_broadcast_f32x8(_mm256_loadu_ps(p))};
    if constexpr (kCount == 16) return load(p);
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store_partial(float* p, size_t n) const { _mm512_mask_storeu_ps(p, mask(n), v); }
  static __mmask16 mask(size_t n) { return static_cast<__mmask16>((1u << n) - 1); }
};
inline Vec<float> operator+(Vec<float> a, Vec<float> b) {
  return {_mm512_add_ps(a.v, b.v)};
}
inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
inline float fma(float a, float b, float c) {
  return __builtin_fmaf(a, b, c);
}
inline Vec<float> max(Vec<float> a, Vec<float> b) {
  return {_mm512_max_ps(a.v, b.v)};
}
inline Vec<float> min(Vec<float> a, Vec<float> b) {
  return {_mm512_min_ps(a.v, b.v)};
}
inline Vec<float> times_power_of_two(Vec<float> a, Vec<float> n) {
  return {_mm512_scalef_ps(a.v, n.v)};
}

template <>
struct Vec<double> {
  static constexpr size_t kLanes = 8;
  __m512d v;

  static Vec zero() { return {_mm512_setzero_pd()}; }
  static Vec broadcast(double x) { return {_mm512_set1_pd(x)}; }
  static Vec load(const double* p) { return {_mm512_loadu_pd(p)}; }
  static Vec load_partial(const double* p, size_t n) { return {_mm512_maskz_loadu_pd(mask(n), p)}; }
  template <size_t kCount>
  static Vec load_group(const double* p) {
    if constexpr (kCount == 1) return broadcast(*p);
    if constexpr (kCount == 2) return {_mm512_broadcast_f64x2(_mm_loadu_pd(p))};
    if constexpr (kCount == 4) return {_mm512_broadcast_f64x4(_mm256_loadu_pd(p))};
    if constexpr (kCount == 8) return load(p);
  }
  void store(double* p) const { _mm512_storeu_pd(p, v); }
  void store_partial(double* p, size_t n) const { _mm512_mask_storeu_pd(p, mask(n), v); }
  static __mmask8 mask(size_t n) { return static_cast<__mmask8>((1u << n) - 1); }
};
inline Vec<double> operator+(Vec<double> a, Vec<double> b) {
  return {_mm512_add_pd(a.v, b.v)};
}
inline Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return {_mm512_fmadd_pd(a.v, b.v, c.v)};
}

template <class T>
inline void in_order(Vec<T>& v) {
  __asm__ volatile("" : "+v"(v.v));
}

// There are registers for both parts, but Clang would store some accumulators in memory all the same.
#if !defined(NPLORA_SIMD_BF16) && defined(__clang__)
template <>
inline constexpr size_t kParts<Bf16Pair> = 2;
#endif
template <>
struct Vec<Bf16Pair> {
  static constexpr size_t kLanes = 16;
  __m512i v;

  static Vec broadcast(Bf16Pair x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }
  static Vec load(const Bf16Pair* p) { return {_mm512_loadu_si512(p)}; }
  static Vec load_partial(const Bf16Pair* p, size_t n) {
    return {_mm512_maskz_loadu_epi32(Vec<float>::mask(n), p)};
  }
  static Vec pair_rows(Vec<Bf16> first, Vec<Bf16> second);
  void store(Bf16Pair* p) const { _mm512_storeu_si512(p, v); }
  void store_partial(Bf16Pair* p, size_t n) const { _mm512_mask_storeu_epi32(p, Vec<float>::mask(n), v); }
};

template <>
struct Vec<Bf16> {
  static constexpr size_t kLanes = 16;
  __m256i v;

  static Vec zero() { return {_mm256_setzero_si256()}; }
  static Vec load(const Bf16* p) { return {bits_at<__m256i>(p)}; }
  static Vec load_partial(const Bf16* p, size_t n) {
    return {_mm256_maskz_loadu_epi16(Vec<float>::mask(n), p)};
  }
};
inline Vec<Bf16Pair> Vec<Bf16Pair>::pair_rows(Vec<Bf16> first, Vec<Bf16> second) {
  const __m512i order = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7,
                                         38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  return {
      _mm512_permutex2var_epi16(_mm512_castsi256_si512(first.v), order, _mm512_castsi256_si512(second.v))};
}

// Separates even-numbered from odd-numbered pairs of 32-bit lanes. Before the call, `a` holds pairs 0 to 7,
// and `b` holds pairs 8 to 15. After the call, `a` holds the even-numbered pairs, and `b` holds the
// odd-numbered pairs.
template <class T>
inline void unzip_pairs(Vec<T>& a, Vec<T>& b) {
  const __m512i even = _mm512_set_epi64(14, 12, 10, 8, 6, 4, 2, 0),
                odd = _mm512_set_epi64(15, 13, 11, 9, 7, 5, 3, 1);
  const auto x = bits_at<__m512i>(&a.v), y = bits_at<__m512i>(&b.v);
  a.v = reinterpret_cast<decltype(a.v)>(_mm512_permutex2var_epi64(x, even, y));
  b.v = reinterpret_cast<decltype(b.v)>(_mm512_permutex2var_epi64(x, odd, y));
}

#if defined(NPLORA_SIMD_BF16)
inline Vec<float> fma(Vec<Bf16Pair> a, Vec<Bf16Pair> b, Vec<float> c) {
  return {_mm512_dpbf16_ps(c.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
}
#else
inline Vec<float> first(Vec<Bf16Pair> a) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(a.v, 16))};
}
inline Vec<float> second(Vec<Bf16Pair> a) {
  return {_mm512_castsi512_ps(_mm512_and_si512(a.v, _mm512_set1_epi32(-65536)))};
}
#endif

inline Vec<float> add_neighbours(Vec<float> a, Vec<float> b) {
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0),
                odd = _mm512_set_epi32(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  return {_mm512_add_ps(_mm512_permutex2var_ps(a.v, even, b.v), _mm512_permutex2var_ps(a.v, odd, b.v))};
}
inline Vec<double> add_neighbours(Vec<double> a, Vec<double> b) {
  unzip_pairs(a, b);
  return {_mm512_add_pd(a.v, b.v)};
}

// Transposes a 16 x 16 block in 16 registers. The first step rearranges 32-bit lanes, the second step 64-bit
// lanes, and the last two steps 128-bit quarters.
inline void transpose(Vec<float> (&r)[16]) {
  __m512 t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i].v, r[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
  }
  __m512 u[16];
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const __m512d a = _mm512_castps_pd(t[i]), b = _mm512_castps_pd(t[i + 1]);
    const __m512d c = _mm512_castps_pd(t[i + 2]), d = _mm512_castps_pd(t[i + 3]);
    u[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    u[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    u[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    u[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
  // Let c = 4 q + j be a column of the block. For g from 0 to 3, quarter q of u[4 g + j] now holds the
  // elements of column c in the rows 4 g to 4 g + 3. The loop collects the four quarters of each column c in
  // r[c].
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 lo02 = _mm512_shuffle_f32x4(u[j], u[4 + j], 0x88),
                 lo13 = _mm512_shuffle_f32x4(u[j], u[4 + j], 0xdd);
    const __m512 hi02 = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0x88);
    const __m512 hi13 = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0xdd);
    r[j].v = _mm512_shuffle_f32x4(lo02, hi02, 0x88);
    r[8 + j].v = _mm512_shuffle_f32x4(lo02, hi02, 0xdd);
    r[4 + j].v = _mm512_shuffle_f32x4(lo13, hi13, 0x88);
    r[12 + j].v = _mm512_shuffle_f32x4(lo13, hi13, 0xdd);
  }
}

// Transposes an 8 x 8 block of doubles. The first step rearranges 64-bit lanes, and the last two steps
// 128-bit quarters.
inline void transpose(Vec<double> (&r)[8]) {
  __m512d t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm512_unpacklo_pd(r[i].v, r[i + 1].v);
    t[i + 1] = _mm512_unpackhi_pd(r[i].v, r[i + 1].v);
  }
#pragma GCC unroll 2
  for (int j = 0; j < 2; ++j) {
    const __m512d lo02 = _mm512_shuffle_f64x2(t[j], t[2 + j], 0x88),
                  lo13 = _mm512_shuffle_f64x2(t[j], t[2 + j], 0xdd);
    const __m512d hi02 = _mm512_shuffle_f64x2(t[4 + j], t[6 + j], 0x88);
    const __m512d hi13 = _mm512_shuffle_f64x2(t[4 + j], t[6 + j], 0xdd);
    r[j].v = _mm512_shuffle_f64x2(lo02, hi02, 0x88);
    r[4 + j].v = _mm512_shuffle_f64x2(lo02, hi02, 0xdd);
    r[2 + j].v = _mm512_shuffle_f64x2(lo13, hi13, 0x88);
    r[6 + j].v = _mm512_shuffle_f64x2(lo13, hi13, 0xdd);
  }
}

// Keeps `v` in a register. GCC would otherwise load `v` from memory again for each use.
template <class T>
inline void keep(Vec<T>& v) {
  __asm__("" : "+v"(v.v));
}
