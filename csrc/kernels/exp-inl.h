// The exponential function that all kernels use, and for_vectors, which loops over an array of floats, one
// vector at a time.

namespace nplora::kernels::NPLORA_ISA {

// Computes exp(x) in each lane. The result is Inf for x above 88.72, a subnormal number for x between about
// -104 and -87.3, and 0 for smaller x. The relative error of a normal result is below 2^-23. NaN stays NaN.
//
// The argument is split into x = n ln 2 + r with a whole number n and |r| <= ln 2 / 2, so that exp(x) = 2^n
// exp(r). A polynomial approximates exp(r). The polynomial begins with 1 + r. The other coefficients are
// chosen to minimise its largest relative error, which is below 2^-28. To compute r, the code splits the
// constant ln 2 into two parts. The first part has only 9 bits, so that n times the first part is exact.
inline Vec<float> exp(Vec<float> x) {
  using V = Vec<float>;
  // Adding kShift rounds to a whole number, because floats from 2^23 to 2^24 are whole numbers.
  constexpr float kShift = 0x1.8p23f;
  constexpr float kCoefficients[] = {
      0.0013814539f, 0.0083687454f, 0.041668389f, 0.16666521f, 0.49999994f, 1, 1};
  const V shift = V::broadcast(kShift);
  x = min(V::broadcast(89), max(V::broadcast(-104), x));
  const V n = fma(x, V(V::broadcast(1.44269504f)), shift) - shift;
  V r = fma(n, V(V::broadcast(-0.693359375f)), x);
  r = fma(n, V(V::broadcast(2.12194440e-4f)), r);
  V p = V::broadcast(kCoefficients[0]);
#pragma GCC unroll 8
  for (size_t i = 1; i < sizeof kCoefficients / sizeof *kCoefficients; ++i)
    p = fma(p, r, V(V::broadcast(kCoefficients[i])));
  return times_power_of_two(p, n);
}

// Whole and Part access one vector of an array of floats. Whole accesses all lanes. Part accesses only the
// first `n` lanes, which is needed for an incomplete vector at the end of an array. In a Part, `load(p)` sets
// the other lanes to zero, `load_or(v, p)` copies the other lanes from v, and `or_zero(v)` returns v with the
// other lanes set to zero.
struct Whole {
  Vec<float> load(const float* p) const { return Vec<float>::load(p); }
  Vec<float> load_or(Vec<float>, const float* p) const { return load(p); }
  void store(Vec<float> v, float* p) const { v.store(p); }
  Vec<float> or_zero(Vec<float> v) const { return v; }
};
struct Part {
  size_t n;
  Vec<float> load(const float* p) const { return Vec<float>::load_partial(p, n); }
  Vec<float> load_or(Vec<float> otherwise, const float* p) const {
    float lanes[Vec<float>::kLanes];
    otherwise.store(lanes);
    load(p).store_partial(lanes, n);
    return Vec<float>::load(lanes);
  }
  void store(Vec<float> v, float* p) const { v.store_partial(p, n); }
  Vec<float> or_zero(Vec<float> v) const {
    float lanes[Vec<float>::kLanes];
    v.store(lanes);
    return load(lanes);
  }
};

// Calls `body(i, span)` for each vector of an array of `n` floats, where i is the index of the first element
// of the vector. The body loads and stores the vector through `span`, which is a Whole if the vector is full,
// and a Part if the last vector is incomplete.
template <class Body>
inline void for_vectors(size_t n, const Body& body) {
  constexpr size_t kLanes = Vec<float>::kLanes;
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, Whole{});
  if (i < n) body(i, Part{n - i});
}

// Combines all lanes of `v` into one number. The function `combine` takes two numbers and returns one. The
// lanes are combined in pairs, then the results in pairs, and so on until one number is left.
template <class Combine>
inline float fold(Vec<float> v, const Combine& combine) {
  float lanes[Vec<float>::kLanes];
  v.store(lanes);
  for (size_t half = Vec<float>::kLanes / 2; half > 0; half /= 2)
    for (size_t i = 0; i < half; ++i) lanes[i] = combine(lanes[i], lanes[i + half]);
  return lanes[0];
}
inline float sum_of_lanes(Vec<float> v) {
  return fold(v, [](float a, float b) { return a + b; });
}

}  // namespace nplora::kernels::NPLORA_ISA
