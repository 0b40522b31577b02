// RMSNorm, LayerNorm, rotary position encoding, gated units, and kernels over rows of logits. Each kernel is
// documented in kernel_table.h.

namespace nplora::kernels::NPLORA_ISA {

// Returns 1 / sqrt(mean x² + eps). The sum of the squares is computed as partial sums, one for each SIMD
// lane, which are added at the end.
inline float inverse_rms(size_t n, const float* x, float eps) {
  Vec<float> squares = Vec<float>::zero();
  for_vectors(n, [&](size_t i, auto span) {
    const Vec<float> v = span.load(x + i);
    squares = fma(v, v, squares);
  });
  return 1 / __builtin_sqrtf(sum_of_lanes(squares) / float(n) + eps);
}

inline void rms_norm(size_t n, const float* x, const float* weight, float eps, float* y) {
  const Vec<float> factor = Vec<float>::broadcast(inverse_rms(n, x, eps));
  for_vectors(
      n, [&](size_t i, auto span) { span.store(span.load(x + i) * factor * span.load(weight + i), y + i); });
}

// The backward pass of y = weight ∘ x r with r = 1 / sqrt(mean x² + eps), where ∘ multiplies element by
// element. With dn = dy ∘ weight, and because dr/dx_j = -r³ x_j / n, the gradient is:
//   dx = r (dn - x r² mean(dn ∘ x))
inline void rms_norm_backward(size_t n, const float* dy, const float* x, const float* weight, float eps,
                              float* dx, bool accumulate) {
  using V = Vec<float>;
  const float r = inverse_rms(n, x, eps);
  V products = V::zero();
  for_vectors(n, [&](size_t i, auto span) {
    products = fma(span.load(dy + i) * span.load(weight + i), span.load(x + i), products);
  });
  const V factor = V::broadcast(r),
          slope = V::broadcast(-r * (r * (r * (sum_of_lanes(products) / float(n)))));
  for_vectors(n, [&](size_t i, auto span) {
    const V along = span.load(x + i) * slope;
    const V d = fma(span.load(dy + i) * span.load(weight + i), factor, along);
    span.store(accumulate ? span.load(dx + i) + d : d, dx + i);
  });
}

// `mean` is the mean of a row, and `r` is 1 / sqrt(variance + eps). The variance is the mean of the squared
// differences between the elements and their mean.
struct Moments {
  float mean, r;
};
inline Moments moments(size_t n, const float* x, float eps) {
  using V = Vec<float>;
  V sum = V::zero(), squares = V::zero();
  for_vectors(n, [&](size_t i, auto span) { sum = sum + span.load(x + i); });
  const float mean = sum_of_lanes(sum) / float(n);
  const V centre = V::broadcast(mean);
  for_vectors(n, [&](size_t i, auto span) {
    const V d = span.or_zero(span.load(x + i) - centre);
    squares = fma(d, d, squares);
  });
  return {mean, 1 / __builtin_sqrtf(sum_of_lanes(squares) / float(n) + eps)};
}

inline void layer_norm(size_t n, const float* x, const float* weight, const float* bias, float eps,
                       float* y) {
  using V = Vec<float>;
  const Moments m = moments(n, x, eps);
  const V mean = V::broadcast(m.mean), r = V::broadcast(m.r);
  for_vectors(n, [&](size_t i, auto span) {
    const V normalised = (span.load(x + i) - mean) * r;
    span.store(fma(normalised, span.load(weight + i), bias ? span.load(bias + i) : V::zero()), y + i);
  });
}

// The backward pass of y = weight ∘ xn + bias with xn = (x - mean) r. The mean and r depend on all elements
// of x. With dn = dy ∘ weight, the gradient is:
//   dx = r (dn - mean(dn) - xn mean(dn ∘ xn))
inline void layer_norm_backward(size_t n, const float* dy, const float* x, const float* weight, float eps,
                                float* dx, bool accumulate) {
  using V = Vec<float>;
  const Moments m = moments(n, x, eps);
  const V mean = V::broadcast(m.mean), r = V::broadcast(m.r);
  V sum = V::zero(), products = V::zero();
  for_vectors(n, [&](size_t i, auto span) {
    const V dn = span.load(dy + i) * span.load(weight + i);
    sum = sum + dn;
    products = fma(dn, (span.load(x + i) - mean) * r, products);
  });
  const V level = V::broadcast(sum_of_lanes(sum) / float(n)),
          along = V::broadcast(sum_of_lanes(products) / float(n));
  for_vectors(n, [&](size_t i, auto span) {
    const V dn = span.load(dy + i) * span.load(weight + i), xn = (span.load(x + i) - mean) * r;
    const V d = r * (dn - level - xn * along);
    span.store(accumulate ? span.load(dx + i) + d : d, dx + i);
  });
}

// Rotates the `half` pairs of one head. The elements of pair i have the indices i * kStep and i * kStep +
// distance. `sign` is -1 if the rotation is inverted, else 1.
template <size_t kStep>
inline void rotate_head(size_t half, size_t distance, const float* __restrict table, float sign,
                        float* __restrict x) {
  for (size_t i = 0; i < half; ++i) {
    float *a = x + i * kStep, *b = a + distance;
    const float cosine = table[i], sine = sign * table[half + i], from_a = *a, from_b = *b;
    // For a * b + c * d, each compiler would choose which product to fuse with the sum, and the last bit
    // would differ. `fma` fixes the choice.
    *a = fma(from_a, cosine, -(from_b * sine));
    *b = fma(from_b, cosine, from_a * sine);
  }
}

inline void rotate(size_t heads, size_t head_dim, size_t half, const float* table, bool interleaved,
                   bool inverse, float* x) {
  const float sign = inverse ? -1.0f : 1.0f;
  for (; heads > 0; --heads, x += head_dim)
    if (interleaved)
      rotate_head<2>(half, 1, table, sign, x);
    else
      rotate_head<1>(half, half, table, sign, x);
}

// Returns 1 / (1 + exp(-g)).
inline Vec<float> sigmoid(Vec<float> g) {
  const Vec<float> one = Vec<float>::broadcast(1);
  return one / (one + exp(Vec<float>::zero() - g));
}

// Every activation has the form act(g) = g * gate(g). Each struct has two functions: gate(g), and backward(d,
// g, s), which returns d * act'(g). The caller must pass gate(g) as `s`.

// An activation with gate(g) = sigmoid(p(g)), where p is a polynomial. With s = gate(g), the derivative is
// act'(g) = s (1 + g p'(g) (1 - s)). `Polynomial::inner` returns p(g), and `Polynomial::slope` returns the
// product g p'(g).
template <class Polynomial>
struct Sigmoidal {
  static Vec<float> gate(Vec<float> g) { return sigmoid(Polynomial::inner(g)); }
  static Vec<float> backward(Vec<float> d, Vec<float> g, Vec<float> s) {
    const Vec<float> one = Vec<float>::broadcast(1);
    return d * s * fma(Polynomial::slope(g), one - s, one);
  }
};

struct SiluInner {  // the polynomial is p(g) = g
  static Vec<float> inner(Vec<float> g) { return g; }
  static Vec<float> slope(Vec<float> g) { return g; }
};
using Silu = Sigmoidal<SiluInner>;

// The tanh form of GELU is g (1 + tanh u) / 2 with u = sqrt(2 / pi) (g + 0.044715 g³) (Hendrycks and Gimpel
// 2016). The sigmoid function s satisfies 1 + tanh u = 2 s(2 u). So gate(g) is s(p(g)) with the polynomial
// p(g) = 2 u = kA g + kB g³.
struct GeluTanhInner {
  static constexpr float kA = 1.5957691216057308f, kB = 0.07135481282553024f;
  static Vec<float> inner(Vec<float> g) {
    return g * fma(Vec<float>::broadcast(kB), g * g, Vec<float>::broadcast(kA));
  }
  static Vec<float> slope(Vec<float> g) {
    return g * fma(Vec<float>::broadcast(3 * kB), g * g, Vec<float>::broadcast(kA));
  }
};
using GeluTanh = Sigmoidal<GeluTanhInner>;

// The exact GELU: gate(g) = Phi(g), and act'(g) = Phi(g) + g phi(g), where Phi is the distribution function
// of N(0, 1), and phi is its density.
//
// The function first computes Phi(-|g|) = erfc(z) / 2 with z = |g| / sqrt(2). For positive g, Phi(g) = 1 -
// Phi(-g). With t = 1 / (1 + z / 2), the approximation is:
//   erfc(z) ≈ t exp(P(t) - z²)
// The coefficients of the polynomial P are kP (Press et al., Numerical Recipes, section 6.2). The relative
// error is below 1.2e-7 for all z.
struct Gelu {
  static Vec<float> gate(Vec<float> g) {
    using V = Vec<float>;
    constexpr float kP[] = {0.17087277f,  -0.82215223f, 1.48851587f, -1.13520398f, 0.27886807f,
                            -0.18628806f, 0.09678418f,  0.37409196f, 1.00002368f,  -1.26551223f};
    const V one = V::broadcast(1), size = max(g, V::zero() - g), square = g * g;
    const V t = one / fma(size, V(V::broadcast(0.35355339059327379f)), one);
    V p = V::broadcast(kP[0]);
#pragma GCC unroll 9
    for (size_t i = 1; i < sizeof kP / sizeof *kP; ++i) p = fma(p, t, V(V::broadcast(kP[i])));
    const V half = V::broadcast(0.5f), tail = half * t * exp(fma(square, V(V::broadcast(-0.5f)), p));
    // `tail` is Phi(-|g|), so Phi(g) is 1 - tail if g > 0, else tail. `positive` is 1 if g is at least 1e-30,
    // and 0 if g <= 0. For g between 0 and 1e-30, `positive` is between 0 and 1, but the result does not
    // depend on `positive`, because `tail` is 1/2.
    const V positive = min(one, max(V::zero(), g * V(V::broadcast(1e30f))));
    return tail + positive * (one - (tail + tail));
  }
  static Vec<float> backward(Vec<float> d, Vec<float> g, Vec<float> s) {
    using V = Vec<float>;
    const V density = V::broadcast(0.39894228040143268f) * exp(g * g * V::broadcast(-0.5f));
    return d * fma(g, density, s);
  }
};

template <class Act>
void gated(size_t n, const float* gate, const float* up, float* out) {
  for_vectors(n, [&](size_t i, auto span) {
    const Vec<float> g = span.load(gate + i), y = g * Act::gate(g);
    span.store(up ? y * span.load(up + i) : y, out + i);
  });
}

// The backward pass of out = act(g) * up, with act(g) = g * s and s = gate(g).
template <class Act>
void gated_backward(size_t n, const float* dout, const float* gate, const float* up, float* dgate,
                    float* dup) {
  using V = Vec<float>;
  for_vectors(n, [&](size_t i, auto span) {
    const V d = span.load(dout + i), g = span.load(gate + i), s = Act::gate(g);
    const V du = up ? d * span.load(up + i) : d;
    span.store(Act::backward(du, g, s), dgate + i);
    if (up) span.store(d * g * s, dup + i);
  });
}

// The loop keeps four separate maxima. With only one, each comparison would have to wait for the result of
// the previous comparison.
inline float largest(size_t n, const float* x) {
  constexpr size_t kLanes = Vec<float>::kLanes;
  const Vec<float> lowest = Vec<float>::broadcast(-3.40282347e38f);
  Vec<float> m[4] = {lowest, lowest, lowest, lowest};
  size_t first = 0;
  for (; first + 4 * kLanes <= n; first += 4 * kLanes)
#pragma GCC unroll 4
    for (size_t k = 0; k < 4; ++k) m[k] = max(m[k], Vec<float>::load(x + first + k * kLanes));
  for_vectors(n - first, [&](size_t i, auto span) { m[0] = max(m[0], span.load_or(lowest, x + first + i)); });
  return fold(max(max(m[0], m[1]), max(m[2], m[3])), [](float a, float b) { return a > b ? a : b; });
}

// While the code reads element i of `x`, it prefetches the element that is kFetchAhead bytes later into L1.
// L1 has room for more than kFetchAhead bytes.
inline float exp_sum(size_t n, const float* x, float shift, float* y) {
  const Vec<float> less = Vec<float>::broadcast(shift);
  Vec<float> sum = Vec<float>::zero();
  for_vectors(n, [&](size_t i, auto span) {
    __builtin_prefetch(reinterpret_cast<const char*>(x + i) + kFetchAhead);
    const Vec<float> e = exp(span.load(x + i) - less);
    if (y) span.store(e, y + i);
    sum = sum + span.or_zero(e);
  });
  return sum_of_lanes(sum);
}

inline void scaled(size_t n, float factor, const float* x, float* y, bool accumulate) {
  const Vec<float> k = Vec<float>::broadcast(factor);
  for_vectors(n, [&](size_t i, auto span) {
    const Vec<float> v = span.load(x + i);
    span.store(accumulate ? fma(v, k, span.load(y + i)) : v * k, y + i);
  });
}

// The code tests the elements in groups of kSelected, and skips a group without elements to select. The
// compiler vectorises this test. Most other groups have only a few elements to select, and a branch for each
// element would often be mispredicted. So the code stores every element of such a group, but increments
// `count` only for the selected elements. An element that is not counted is overwritten by the next element.
inline size_t select(size_t n, const float* x, float least, size_t limit, int32_t* ids, float* values) {
  size_t count = 0;
  for (size_t first = 0; first < n; first += kSelected) {
    const size_t end = smaller(first + kSelected, n);
    int any = 0;
    for (size_t i = first; i < end; ++i) any |= x[i] >= least;
    if (!any) continue;
    for (size_t i = first; i < end; ++i) {
      ids[count] = static_cast<int32_t>(i);
      values[count] = x[i];
      count += x[i] >= least;
    }
    if (count > limit) return limit + 1;
  }
  return count;
}

// Does the work of add_rows for kPanels full panels, where `out` points to the first of their columns. The
// elements of `out` in these panels stay in registers until all rows are added.
template <size_t kPanels>
inline void add_rows_of_panels(size_t count, const uint8_t* ids, const float* weights,
                               const Panels<float>& rows, float* out) {
  using V = Vec<float>;
  constexpr size_t kVectors = kPanelColumns / V::kLanes;
  V sums[kPanels][kVectors];
#pragma GCC unroll 12
  for (size_t p = 0; p < kPanels; ++p)
#pragma GCC unroll 12
    for (size_t v = 0; v < kVectors; ++v) sums[p][v] = V::load(out + p * kPanelColumns + v * V::kLanes);
  for (size_t i = 0; i < count; ++i) {
    const float* row = rows.data + ids[i] * rows.row_stride;
    const V weight = V::broadcast(weights[i]);
#pragma GCC unroll 12
    for (size_t p = 0; p < kPanels; ++p)
#pragma GCC unroll 12
      for (size_t v = 0; v < kVectors; ++v)
        sums[p][v] = fma(weight, V::load(row + p * rows.panel_stride + v * V::kLanes), sums[p][v]);
  }
#pragma GCC unroll 12
  for (size_t p = 0; p < kPanels; ++p)
#pragma GCC unroll 12
    for (size_t v = 0; v < kVectors; ++v) sums[p][v].store(out + p * kPanelColumns + v * V::kLanes);
}

inline void add_rows(size_t count, size_t n, const uint8_t* ids, const float* weights,
                     const Panels<float>& rows, float* out) {
  // The code computes kMost panels of `out` at a time. These panels take 12 vectors.
  constexpr size_t kLanes = Vec<float>::kLanes,
                   kMost = 12 * kLanes < kPanelColumns ? 1 : 12 * kLanes / kPanelColumns;
  Panels<float> at = rows;
  for (; n >= kMost * kPanelColumns; n -= kMost * kPanelColumns, out += kMost * kPanelColumns) {
    add_rows_of_panels<kMost>(count, ids, weights, at, out);
    at.data += kMost * rows.panel_stride;
  }
  for (; n >= kPanelColumns; n -= kPanelColumns, out += kPanelColumns, at.data += rows.panel_stride)
    add_rows_of_panels<1>(count, ids, weights, at, out);
  for_vectors(n, [&](size_t j, auto span) {
    Vec<float> sum = span.load(out + j);
    for (size_t i = 0; i < count; ++i)
      sum = fma(Vec<float>::broadcast(weights[i]), span.load(at.data + ids[i] * rows.row_stride + j), sum);
    span.store(sum, out + j);
  });
}

inline float dot(size_t n, const float* a, const float* b) {
  Vec<float> sum = Vec<float>::zero();
  for_vectors(n, [&](size_t i, auto span) { sum = fma(span.load(a + i), span.load(b + i), sum); });
  return sum_of_lanes(sum);
}

}  // namespace nplora::kernels::NPLORA_ISA
