// RMSNorm, rotary position encoding, gated units, and kernels over rows of logits. Each kernel is
// documented in kernel_table.h.

namespace nplora::kernels::NPLORA_ISA {

// Returns 1 / sqrt(mean x² + eps). Each lane adds up its own partial sum of squares.
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

// The backward pass of y = weight ∘ x r, where r is 1 / sqrt(mean x² + eps). The gradient is dx = r (dn - x
// r² mean(dn ∘ x)) with dn = dy ∘ weight, because dr/dx_j = -r³ x_j / n.
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

// Rotates the pairs of one head. Neighbouring pairs are kStep elements apart, and the two elements of a pair
// are `distance` elements apart.
template <size_t kStep>
inline void rotate_head(size_t half, size_t distance, const float* __restrict table, float sign,
                        float* __restrict x) {
  for (size_t i = 0; i < half; ++i) {
    float *a = x + i * kStep, *b = a + distance;
    const float cosine = table[i], sine = sign * table[half + i], from_a = *a, from_b = *b;
    *a = from_a * cosine - from_b * sine;
    *b = from_b * cosine + from_a * sine;
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

// 1 / (1 + exp(-g))
inline Vec<float> sigmoid(Vec<float> g) {
  const Vec<float> one = Vec<float>::broadcast(1);
  return one / (one + exp(Vec<float>::zero() - g));
}

// Both activations have the form g * sigmoid(p(g)), each with its own polynomial p. In each struct, `inner`
// returns p(g), and `slope` returns g * p'(g), where p' is the derivative of p.

struct Silu {  // p = g
  static Vec<float> inner(Vec<float> g) { return g; }
  static Vec<float> slope(Vec<float> g) { return g; }
};

// The tanh form of GELU is g (1 + tanh u) / 2 with u = sqrt(2 / pi) (g + 0.044715 g³) (Hendrycks and Gimpel
// 2016). Since 1 + tanh u = 2 s(2 u) for the sigmoid function s, the polynomial p of this activation is 2 u =
// kA g + kB g³.
struct GeluTanh {
  static constexpr float kA = 1.5957691216057308f, kB = 0.07135481282553024f;
  static Vec<float> inner(Vec<float> g) {
    return g * fma(Vec<float>::broadcast(kB), g * g, Vec<float>::broadcast(kA));
  }
  static Vec<float> slope(Vec<float> g) {
    return g * fma(Vec<float>::broadcast(3 * kB), g * g, Vec<float>::broadcast(kA));
  }
};

template <class Act>
void gated(size_t n, const float* gate, const float* up, float* out) {
  for_vectors(n, [&](size_t i, auto span) {
    const Vec<float> g = span.load(gate + i);
    span.store(g * sigmoid(Act::inner(g)) * span.load(up + i), out + i);
  });
}

// The backward pass of out = g s up, where s is the sigmoid of p(g) and its derivative is s (1 - s) p'.
template <class Act>
void gated_backward(size_t n, const float* dout, const float* gate, const float* up, float* dgate,
                    float* dup) {
  using V = Vec<float>;
  const V one = V::broadcast(1);
  for_vectors(n, [&](size_t i, auto span) {
    const V d = span.load(dout + i), g = span.load(gate + i), u = span.load(up + i);
    const V s = sigmoid(Act::inner(g));
    span.store(d * u * s * fma(Act::slope(g), one - s, one), dgate + i);
    span.store(d * g * s, dup + i);
  });
}

// Keeps four independent maxima, because a single maximum would wait for the result of each comparison.
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

// Prefetches `x` kFetchAhead bytes ahead. An L1 cache has room for all these bytes.
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

inline float dot(size_t n, const float* a, const float* b) {
  Vec<float> sum = Vec<float>::zero();
  for_vectors(n, [&](size_t i, auto span) { sum = fma(span.load(a + i), span.load(b + i), sum); });
  return sum_of_lanes(sum);
}

}  // namespace nplora::kernels::NPLORA_ISA
