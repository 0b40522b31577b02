// 4 floats or 2 doubles in one NEON register. Included by vec.h, inside the namespace of one instruction set.
template <>
struct Vec<float> {
  static constexpr size_t kLanes = 4;
  float32x4_t v;

  static Vec zero() { return {vdupq_n_f32(0)}; }
  static Vec broadcast(float x) { return {vdupq_n_f32(x)}; }
  static Vec load(const float* p) { return {vld1q_f32(p)}; }
  static Vec load_partial(const float* p, size_t n) {
    float t[4] = {0, 0, 0, 0};
    for (size_t i = 0; i < n; ++i) t[i] = p[i];
    return load(t);
  }
  static Vec load(const Bf16* p) { return widen(vld1_u16(reinterpret_cast<const uint16_t*>(p))); }
  static Vec widen(uint16x4_t bits) { return {vreinterpretq_f32_u32(vshll_n_u16(bits, 16))}; }
  template <size_t kCount>
  static Vec load_group(const float* p) {
    if constexpr (kCount == 1) return {vld1q_dup_f32(p)};
    if constexpr (kCount == 2) return {vreinterpretq_f32_u64(vdupq_n_u64(bits_at<uint64_t>(p)))};
    if constexpr (kCount == 4) return load(p);
  }
  template <size_t kCount>
  static Vec load_group(const Bf16* p) {
    if constexpr (kCount == 1) return widen(vdup_n_u16(bits_at<uint16_t>(p)));
    if constexpr (kCount == 2) return widen(vreinterpret_u16_u32(vdup_n_u32(bits_at<uint32_t>(p))));
    if constexpr (kCount == 4) return load(p);
  }
  static Vec load_partial(const Bf16* p, size_t n) {
    Bf16 t[4] = {};
    for (size_t i = 0; i < n; ++i) t[i] = p[i];
    return load(t);
  }
  void store(float* p) const { vst1q_f32(p, v); }
  void store_partial(float* p, size_t n) const {
    float t[4];
    store(t);
    for (size_t i = 0; i < n; ++i) p[i] = t[i];
  }
};
inline Vec<float> operator+(Vec<float> a, Vec<float> b) {
  return {vaddq_f32(a.v, b.v)};
}
inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return {vfmaq_f32(c.v, a.v, b.v)};
}

template <>
struct Vec<double> {
  static constexpr size_t kLanes = 2;
  float64x2_t v;

  static Vec zero() { return {vdupq_n_f64(0)}; }
  static Vec broadcast(double x) { return {vdupq_n_f64(x)}; }
  static Vec load(const double* p) { return {vld1q_f64(p)}; }
  template <size_t kCount>
  static Vec load_group(const double* p) {
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

template <>
struct Vec<Bf16Pair> {
  static constexpr size_t kLanes = 4;
  uint32x4_t v;

  static Vec broadcast(Bf16Pair x) { return {vdupq_n_u32(static_cast<uint32_t>(x))}; }
  static Vec load(const Bf16Pair* p) { return {vld1q_u32(reinterpret_cast<const uint32_t*>(p))}; }
  static Vec load_partial(const Bf16Pair* p, size_t n) {
    Bf16Pair t[4] = {};
    for (size_t i = 0; i < n; ++i) t[i] = p[i];
    return load(t);
  }
  template <size_t kCount>
  static Vec load_group(const Bf16Pair* p) {
    if constexpr (kCount == 1) return broadcast(*p);
    if constexpr (kCount == 2) return {vreinterpretq_u32_u64(vdupq_n_u64(bits_at<uint64_t>(p)))};
    if constexpr (kCount == 4) return load(p);
  }
  static Vec pair_rows(Vec<Bf16> first, Vec<Bf16> second);
};

template <>
struct Vec<Bf16> {
  static constexpr size_t kLanes = 4;
  uint16x4_t v;

  static Vec zero() { return {vdup_n_u16(0)}; }
  static Vec load(const Bf16* p) { return {vld1_u16(reinterpret_cast<const uint16_t*>(p))}; }
  static Vec load_partial(const Bf16* p, size_t n) {
    Bf16 t[4] = {};
    for (size_t i = 0; i < n; ++i) t[i] = p[i];
    return load(t);
  }
};
inline Vec<Bf16Pair> Vec<Bf16Pair>::pair_rows(Vec<Bf16> first, Vec<Bf16> second) {
  const uint16x4x2_t pairs = vzip_u16(first.v, second.v);
  return {vreinterpretq_u32_u16(vcombine_u16(pairs.val[0], pairs.val[1]))};
}
inline Vec<float> first(Vec<Bf16Pair> a) {
  return {vreinterpretq_f32_u32(vshlq_n_u32(a.v, 16))};
}
inline Vec<float> second(Vec<Bf16Pair> a) {
  return {vreinterpretq_f32_u32(vandq_u32(a.v, vdupq_n_u32(0xFFFF0000u)))};
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

// Holds v in its register: GCC would load it from memory again for each use.
template <class T>
inline void keep(Vec<T>& v) {
  __asm__("" : "+w"(v.v));
}
