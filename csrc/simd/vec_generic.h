// Vectors of 4 floats or 2 doubles in the compiler's own vector types, for any machine. The code does not
// assume that the machine has fused multiply-adds. Only vec.h includes this file, inside the namespace
// NPLORA_ISA.
typedef uint16_t FourHalves __attribute__((vector_size(8)));
typedef uint32_t FourWords __attribute__((vector_size(16)));
inline FourWords wider(FourHalves halves) {
  return __builtin_convertvector(halves, FourWords);
}

template <class T>
struct Vec {
  static constexpr size_t kLanes = 16 / sizeof(T);
  typedef T Register __attribute__((vector_size(16)));
  Register v;

  static Vec zero() { return {Register{}}; }
  static Vec broadcast(T x) {
    if constexpr (kLanes == 4)
      return {Register{x, x, x, x}};
    else
      return {Register{x, x}};
  }
  static Vec load(const T* p) {
    Vec r;
    __builtin_memcpy(&r.v, p, sizeof r.v);
    return r;
  }
  static Vec load_partial(const T* p, size_t n) {
    Vec r = zero();
    for (size_t i = 0; i < n; ++i) r.v[i] = p[i];
    return r;
  }
  template <size_t kCount, class W>
  static Vec load_group(const W* p) {
    if constexpr (kCount == kLanes) return load(p);
    const Register v = load_partial(p, kCount).v;
    if constexpr (kLanes == 4)
      return {Register{v[0], v[1 % kCount], v[2 % kCount], v[3 % kCount]}};
    else
      return {Register{v[0], v[0]}};
  }
  static Vec load(const Bf16* p) {
    return {__builtin_bit_cast(Register, wider(bits_at<FourHalves>(p)) << 16)};
  }
  static Vec load_partial(const Bf16* p, size_t n) {
    FourHalves halves{};
    for (size_t i = 0; i < n; ++i) halves[i] = static_cast<uint16_t>(p[i]);
    return {__builtin_bit_cast(Register, wider(halves) << 16)};
  }
  void store(T* p) const { __builtin_memcpy(p, &v, sizeof v); }
  void store_partial(T* p, size_t n) const {
    for (size_t i = 0; i < n; ++i) p[i] = v[i];
  }
};
template <class T>
inline Vec<T> operator+(Vec<T> a, Vec<T> b) {
  return {a.v + b.v};
}
template <class T>
inline Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {
  return {a.v * b.v + c.v};
}
inline float fma(float a, float b, float c) {
#if defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, c);  // in a * b + c, the compiler could fuse a product that `c` contains
#else
  return a * b + c;
#endif
}
template <class T>
inline Vec<T> max(Vec<T> a, Vec<T> b) {
  return {a.v > b.v ? a.v : b.v};
}
template <class T>
inline Vec<T> min(Vec<T> a, Vec<T> b) {
  return {a.v < b.v ? a.v : b.v};
}

typedef int32_t WholeNumbers __attribute__((vector_size(16)));
inline Vec<float> power_of_two(WholeNumbers n) {
  return {__builtin_bit_cast(Vec<float>::Register, (n + 127) << 23)};
}
// After 1.5 * 2^23 is added to the float `n`, the low bits of the sum hold `n` as an integer. The addition
// replaces a conversion to integers, which would be undefined for NaN.
inline Vec<float> times_power_of_two(Vec<float> a, Vec<float> n) {
  constexpr float kShift = 0x1.8p23f;
  const WholeNumbers whole =
                         __builtin_bit_cast(WholeNumbers, n.v + kShift) - __builtin_bit_cast(int32_t, kShift),
                     half = whole >> 1;
  return {a.v * power_of_two(half).v * power_of_two(whole - half).v};
}

template <>
struct Vec<Bf16Pair> {
  static constexpr size_t kLanes = 4;
  FourWords v;

  static Vec broadcast(Bf16Pair x) {
    const uint32_t bits = static_cast<uint32_t>(x);
    return {FourWords{bits, bits, bits, bits}};
  }
  static Vec load(const Bf16Pair* p) { return {bits_at<FourWords>(p)}; }
  static Vec load_partial(const Bf16Pair* p, size_t n) {
    Vec r{};
    for (size_t i = 0; i < n; ++i) r.v[i] = static_cast<uint32_t>(p[i]);
    return r;
  }
  static Vec pair_rows(Vec<Bf16> first, Vec<Bf16> second);
};

template <>
struct Vec<Bf16> {
  static constexpr size_t kLanes = 4;
  FourHalves v;

  static Vec zero() { return {FourHalves{}}; }
  static Vec load(const Bf16* p) { return {bits_at<FourHalves>(p)}; }
  static Vec load_partial(const Bf16* p, size_t n) {
    Vec r = zero();
    for (size_t i = 0; i < n; ++i) r.v[i] = static_cast<uint16_t>(p[i]);
    return r;
  }
};
inline Vec<Bf16Pair> Vec<Bf16Pair>::pair_rows(Vec<Bf16> first, Vec<Bf16> second) {
  return {wider(first.v) | wider(second.v) << 16};
}
inline Vec<float> first(Vec<Bf16Pair> a) {
  return {__builtin_bit_cast(Vec<float>::Register, a.v << 16)};
}
inline Vec<float> second(Vec<Bf16Pair> a) {
  return {__builtin_bit_cast(Vec<float>::Register, a.v & 0xFFFF0000u)};
}

template <class T>
inline Vec<T> add_neighbours(Vec<T> a, Vec<T> b) {
  constexpr size_t kHalf = Vec<T>::kLanes / 2;
  Vec<T> r;
  for (size_t i = 0; i < kHalf; ++i) {
    r.v[i] = a.v[2 * i] + a.v[2 * i + 1];
    r.v[kHalf + i] = b.v[2 * i] + b.v[2 * i + 1];
  }
  return r;
}

template <class T, size_t N>
inline void transpose(Vec<T> (&r)[N]) {
  for (size_t i = 0; i < N; ++i)
    for (size_t j = 0; j < i; ++j) {
      const T t = r[i].v[j];
      r[i].v[j] = r[j].v[i];
      r[j].v[i] = t;
    }
}

template <class T>
inline void in_order(Vec<T>&) {}
template <class T>
inline void keep(Vec<T>&) {}
