// Vectors of 4 floats or 2 doubles in one NEON register. Only vec.h includes this file, inside the namespace
// NPLORA_ISA.

// The type that `broadcast` returns. A Scalar holds one number instead of a vector of copies, because NEON
// can multiply a vector by one element of another vector. A plain load (ldr) is enough to load one number.
// The instruction ld1r, which loads a vector of copies, would also occupy the pipelines of the multipliers
// (Neoverse and Cortex-A7x optimisation guides). The instruction ld1r also takes no offset, so each address
// would need an addition.
template <class T>
struct Scalar;
template <>
struct Scalar<float> {
  float32x2_t v;
  operator Vec<float>() const;
};
template <>
struct Scalar<double> {
  float64x1_t v;
  operator Vec<double>() const;
};
template <>
struct Scalar<Bf16Pair> {
  uint32x2_t v;
  operator Vec<Bf16Pair>() const;
};

// `first_words` loads the first `n` of 4 words of 32 bits, and sets the other lanes to 0. `first_halves`
// loads the first `n` of 4 words of 16 bits, and also sets the other lanes to 0. Both functions load directly
// into registers. A loop over the words would instead build the vector on the stack.
inline uint32x4_t first_words(const void* p, size_t n) {
  uint64_t pair = 0;
  uint32_t third = 0;
  if (n >= 4) return vld1q_u32(static_cast<const uint32_t*>(p));
  if (n == 1) __builtin_memcpy(&pair, p, 4);
  if (n >= 2) __builtin_memcpy(&pair, p, 8);
  if (n == 3) __builtin_memcpy(&third, static_cast<const char*>(p) + 8, 4);
  return vcombine_u32(vcreate_u32(pair), vcreate_u32(third));
}
inline uint16x4_t first_halves(const void* p, size_t n) {
  uint32_t pair = 0;
  uint16_t last = 0;
  if (n >= 4) return vld1_u16(static_cast<const uint16_t*>(p));
  if (n >= 2) __builtin_memcpy(&pair, p, 4);
  if (n % 2 == 1) __builtin_memcpy(&last, static_cast<const char*>(p) + 2 * (n - 1), 2);
  return vcreate_u16(pair | uint64_t{last} << 16 * (n & 2));
}

template <>
struct Vec<float> {
  static constexpr size_t kLanes = 4;
  float32x4_t v;

  static Vec zero() { return {vdupq_n_f32(0)}; }
  static Scalar<float> broadcast(float x) { return {vset_lane_f32(x, vdup_n_f32(0), 0)}; }
  static Vec load(const float* p) { return {vld1q_f32(p)}; }
  static Vec load_partial(const float* p, size_t n) { return {vreinterpretq_f32_u32(first_words(p, n))}; }
  static Vec load(const Bf16* p) { return widen(vld1_u16(reinterpret_cast<const uint16_t*>(p))); }
  static Vec load_partial(const Bf16* p, size_t n) { return widen(first_halves(p, n)); }
  static Vec widen(uint16x4_t bits) { return {vreinterpretq_f32_u32(vshll_n_u16(bits, 16))}; }
  template <size_t kCount>
  static auto load_group(const float* p) {
    if constexpr (kCount == 1) return broadcast(*p);
    if constexpr (kCount == 2) return Vec{vreinterpretq_f32_u64(vdupq_n_u64(bits_at<uint64_t>(p)))};
    if constexpr (kCount == 4) return load(p);
  }
  void store(float* p) const { vst1q_f32(p, v); }
  void store_partial(float* p, size_t n) const {
    if (n > 0) vst1q_lane_f32(p, v, 0);
    if (n > 1) vst1q_lane_f32(p + 1, v, 1);
    if (n > 2) vst1q_lane_f32(p + 2, v, 2);
    if (n > 3) vst1q_lane_f32(p + 3, v, 3);
  }
};
inline Vec<float> operator+(Vec<float> a, Vec<float> b) {
  return {vaddq_f32(a.v, b.v)};
}
inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return {vfmaq_f32(c.v, a.v, b.v)};
}
inline float fma(float a, float b, float c) {
  return __builtin_fmaf(a, b, c);
}
inline Vec<float> fma(Vec<float> a, Scalar<float> b, Vec<float> c) {
  return {vfmaq_lane_f32(c.v, a.v, b.v, 0)};
}
inline Vec<float> max(Vec<float> a, Vec<float> b) {
  return {vmaxq_f32(a.v, b.v)};
}
inline Vec<float> min(Vec<float> a, Vec<float> b) {
  return {vminq_f32(a.v, b.v)};
}
inline Vec<float> power_of_two(int32x4_t n) {
  return {vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23))};
}
inline Vec<float> times_power_of_two(Vec<float> a, Vec<float> n) {
  const int32x4_t whole = vcvtq_s32_f32(n.v), half = vshrq_n_s32(whole, 1);
  return {a.v * power_of_two(half).v * power_of_two(vsubq_s32(whole, half)).v};
}

template <>
struct Vec<double> {
  static constexpr size_t kLanes = 2;
  float64x2_t v;

  static Vec zero() { return {vdupq_n_f64(0)}; }
  static Scalar<double> broadcast(double x) { return {vdup_n_f64(x)}; }
  static Vec load(const double* p) { return {vld1q_f64(p)}; }
  template <size_t kCount>
  static auto load_group(const double* p) {
    if constexpr (kCount == 1) return broadcast(*p);
    if constexpr (kCount == 2) return load(p);
  }
  static Vec load_partial(const double* p, size_t n) {
    return n == 1 ? Vec{vsetq_lane_f64(*p, vdupq_n_f64(0), 0)} : n ? load(p) : zero();
  }
  void store(double* p) const { vst1q_f64(p, v); }
  void store_partial(double* p, size_t n) const {
    if (n >= 2) return store(p);
    if (n == 1) *p = vgetq_lane_f64(v, 0);
  }
};
inline Vec<double> operator+(Vec<double> a, Vec<double> b) {
  return {vaddq_f64(a.v, b.v)};
}
inline Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return {vfmaq_f64(c.v, a.v, b.v)};
}
inline Vec<double> fma(Vec<double> a, Scalar<double> b, Vec<double> c) {
  return {vfmaq_lane_f64(c.v, a.v, b.v, 0)};
}

template <>
struct Vec<Bf16Pair> {
  static constexpr size_t kLanes = 4;
  uint32x4_t v;

  static Scalar<Bf16Pair> broadcast(Bf16Pair x) { return {vcreate_u32(static_cast<uint32_t>(x))}; }
  static Vec load(const Bf16Pair* p) { return {vld1q_u32(reinterpret_cast<const uint32_t*>(p))}; }
  static Vec load_partial(const Bf16Pair* p, size_t n) { return {first_words(p, n)}; }
  static Vec pair_rows(Vec<Bf16> first, Vec<Bf16> second);
};

template <>
struct Vec<Bf16> {
  static constexpr size_t kLanes = 4;
  uint16x4_t v;

  static Vec zero() { return {vdup_n_u16(0)}; }
  static Vec load(const Bf16* p) { return {vld1_u16(reinterpret_cast<const uint16_t*>(p))}; }
  static Vec load_partial(const Bf16* p, size_t n) { return {first_halves(p, n)}; }
};
inline Vec<Bf16Pair> Vec<Bf16Pair>::pair_rows(Vec<Bf16> first, Vec<Bf16> second) {
  const uint16x4_t none = vdup_n_u16(0);  // vcombine needs a second half, which zip1 does not read
  return {vreinterpretq_u32_u16(vzip1q_u16(vcombine_u16(first.v, none), vcombine_u16(second.v, none)))};
}

#if defined(NPLORA_SIMD_BF16)
inline Vec<float> fma(Vec<Bf16Pair> a, Vec<Bf16Pair> b, Vec<float> c) {
  return {vbfdotq_f32(c.v, vreinterpretq_bf16_u32(a.v), vreinterpretq_bf16_u32(b.v))};
}
inline Vec<float> fma(Vec<Bf16Pair> a, Scalar<Bf16Pair> b, Vec<float> c) {
  return {vbfdotq_lane_f32(c.v, vreinterpretq_bf16_u32(a.v), vreinterpret_bf16_u32(b.v), 0)};
}
#else
inline Vec<float> first(Vec<Bf16Pair> a) {
  return {vreinterpretq_f32_u32(vshlq_n_u32(a.v, 16))};
}
inline Vec<float> second(Vec<Bf16Pair> a) {
  return {vreinterpretq_f32_u32(vandq_u32(a.v, vdupq_n_u32(0xFFFF0000u)))};
}
// One shift converts the two bfloat16 numbers of the pair `b` to floats, in lanes 0 and 1 of `halves`.
inline Vec<float> fma(Vec<Bf16Pair> a, Scalar<Bf16Pair> b, Vec<float> c) {
  const float32x4_t halves = vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u32(b.v), 16));
  return {vfmaq_laneq_f32(vfmaq_laneq_f32(c.v, first(a).v, halves, 0), second(a).v, halves, 1)};
}
#endif

template <class E, class T>
inline Vec<T> fma(Scalar<E> a, Vec<E> b, Vec<T> c) {
  return fma(b, a, c);
}
inline Scalar<float>::operator Vec<float>() const {
  return {vdupq_lane_f32(v, 0)};
}
inline Scalar<double>::operator Vec<double>() const {
  return {vdupq_lane_f64(v, 0)};
}
inline Scalar<Bf16Pair>::operator Vec<Bf16Pair>() const {
  return {vdupq_lane_u32(v, 0)};
}

inline Vec<float> add_neighbours(Vec<float> a, Vec<float> b) {
  return {vpaddq_f32(a.v, b.v)};
}
inline Vec<double> add_neighbours(Vec<double> a, Vec<double> b) {
  return {vpaddq_f64(a.v, b.v)};
}

inline void transpose(Vec<float> (&r)[4]) {
  const float32x4x2_t t01 = vtrnq_f32(r[0].v, r[1].v), t23 = vtrnq_f32(r[2].v, r[3].v);
  r[0].v = vcombine_f32(vget_low_f32(t01.val[0]), vget_low_f32(t23.val[0]));
  r[1].v = vcombine_f32(vget_low_f32(t01.val[1]), vget_low_f32(t23.val[1]));
  r[2].v = vcombine_f32(vget_high_f32(t01.val[0]), vget_high_f32(t23.val[0]));
  r[3].v = vcombine_f32(vget_high_f32(t01.val[1]), vget_high_f32(t23.val[1]));
}

inline void transpose(Vec<double> (&r)[2]) {
  const float64x2_t t = vzip1q_f64(r[0].v, r[1].v);
  r[1].v = vzip2q_f64(r[0].v, r[1].v);
  r[0].v = t;
}

template <class T>
inline void in_order(Vec<T>& v) {
  __asm__ volatile("" : "+w"(v.v));
}

// Keeps `v` in a register. GCC would otherwise load `v` from memory again for each use.
template <class T>
inline void keep(Vec<T>& v) {
  __asm__("" : "+w"(v.v));
}
