// The kernels of attention: the softmax, its backward pass, and the products for a single query. In the
// softmax kernels, each SIMD lane holds one head of one query, so these kernels never sum across lanes. Each
// kernel is documented in kernel_table.h.

namespace nplora::kernels::NPLORA_ISA {

// Returns the prefetch distance, in bytes, for a kernel that reads `rows` rows of keys or values at a time.
// Successive rows are `stride` elements apart. The distance is a whole number of rows, and at least
// kFetchAhead bytes. The distance is also at least `rows` rows, so that the kernel never prefetches a row
// that it is already reading.
inline size_t fetch_distance(size_t rows, size_t stride) {
  const size_t bytes = stride * sizeof(float);
  return bytes * (rows * bytes > kFetchAhead ? rows : ceil_div(kFetchAhead, bytes));
}

// Multiplies the query `q` (dim) with kRows rows of the keys `k` (kRows, dim). The dot product of `q` and row
// j is the sum of the lanes of `sums[j]`. If kFetch is set, the function prefetches the keys that are `ahead`
// bytes after the keys that it reads.
template <size_t kRows, bool kFetch>
__attribute__((always_inline)) inline void row_products(size_t dim, const float* q, const float* k,
                                                        size_t stride, size_t ahead, Vec<float>* sums) {
  constexpr size_t kLanes = Vec<float>::kLanes;
#pragma GCC unroll 8
  for (size_t j = 0; j < kRows; ++j) sums[j] = Vec<float>::zero();
  size_t i = 0;
  for (; i + kLanes <= dim; i += kLanes) {
    const Vec<float> query = Vec<float>::load(q + i);
#pragma GCC unroll 8
    for (size_t j = 0; j < kRows; ++j) {
      const float* key = k + j * stride + i;
      if (kFetch) __builtin_prefetch(reinterpret_cast<const char*>(key) + ahead);
      sums[j] = fma(Vec<float>::load(key), query, sums[j]);
    }
  }
  if (i == dim) return;
  const Vec<float> query = Vec<float>::load_partial(q + i, dim - i);
#pragma GCC unroll 8
  for (size_t j = 0; j < kRows; ++j)
    sums[j] = fma(Vec<float>::load_partial(k + j * stride + i, dim - i), query, sums[j]);
}

template <size_t kCount>
inline Vec<float> sum_of(const Vec<float>* v) {
  if constexpr (kCount == 1)
    return v[0];
  else
    return sum_of<kCount / 2>(v) + sum_of<kCount / 2>(v + kCount / 2);
}

// Computes the dot products of the heads of a query with the rows of `k`, for two heads and kRows rows at a
// time, where kRows is half the number of lanes. For each dot product, the function first computes a vector
// of partial sums. Two heads and kRows rows give 2 kRows vectors of 2 kRows lanes, so the vectors form a
// square matrix. The function transposes this matrix and then adds its rows. Each lane of the result is one
// dot product. The rows of `k` that are left at the end are processed one by one.
inline void key_dots(size_t rows, size_t heads, size_t group, size_t dim, const float* q, const float* k,
                     size_t k_stride, float* scores, size_t s_stride) {
  using V = Vec<float>;
  constexpr size_t kRows = V::kLanes / 2;
  const size_t ahead = fetch_distance(kRows, k_stride);
  for (; rows >= kRows; rows -= kRows, k += kRows * k_stride, scores += kRows)
    for (size_t h = 0; h < heads; h += 2) {
      // If the number of heads is odd, the last head is computed twice.
      const size_t second = smaller(h + 1, heads - 1);
      V block[2 * kRows];
      row_products<kRows, true>(dim, q + h * dim, k + h / group * dim, k_stride, ahead, block);
      row_products<kRows, true>(dim, q + second * dim, k + second / group * dim, k_stride, ahead,
                                block + kRows);
      transpose(block);
      float sums[2 * kRows];
      sum_of<2 * kRows>(block).store(sums);
      __builtin_memcpy(scores + h * s_stride, sums, kRows * sizeof(float));
      __builtin_memcpy(scores + second * s_stride, sums + kRows, kRows * sizeof(float));
    }
  for (; rows > 0; --rows, k += k_stride, ++scores)
    for (size_t h = 0; h < heads; ++h) {
      V sum[1];
      row_products<1, false>(dim, q + h * dim, k + h / group * dim, k_stride, 0, sum);
      scores[h * s_stride] = sum_of_lanes(sum[0]);
    }
}

// Multiplies kRows rows of `v` by their weights and adds the products to `out`. Each vector of `out` is
// loaded and stored only once for all kRows rows.
template <size_t kRows>
inline void add_value_rows(size_t heads, size_t group, size_t dim, const float* weights, size_t w_stride,
                           const float* v, size_t v_stride, float* out) {
  using V = Vec<float>;
  const size_t ahead = fetch_distance(kRows, v_stride);
  for (size_t h = 0; h < heads; h += group)
    for_vectors(dim, [&](size_t i, auto span) {
      V values[kRows];
#pragma GCC unroll 4
      for (size_t r = 0; r < kRows; ++r) {
        const float* value = v + r * v_stride + h / group * dim + i;
        __builtin_prefetch(reinterpret_cast<const char*>(value) + ahead, 0, 2);
        values[r] = span.load(value);
      }
      for (size_t g = h; g < h + group; ++g) {
        V sum = span.load(out + g * dim + i);
#pragma GCC unroll 4
        for (size_t r = 0; r < kRows; ++r) sum = fma(values[r], V::broadcast(weights[g * w_stride + r]), sum);
        span.store(sum, out + g * dim + i);
      }
    });
}

inline void add_values(size_t rows, size_t heads, size_t group, size_t dim, const float* weights,
                       size_t w_stride, const float* v, size_t v_stride, float* out) {
  constexpr size_t kRows = 4;
  for (; rows >= kRows; rows -= kRows, weights += kRows, v += kRows * v_stride)
    add_value_rows<kRows>(heads, group, dim, weights, w_stride, v, v_stride, out);
  for (; rows > 0; --rows, ++weights, v += v_stride)
    add_value_rows<1>(heads, group, dim, weights, w_stride, v, v_stride, out);
}

inline void scale_columns(size_t rows, size_t n, const float* factor, float* x, size_t x_stride) {
  for_vectors(n, [&](size_t j, auto span) {
    const Vec<float> k = span.load(factor + j);
    for (size_t i = 0; i < rows; ++i) span.store(span.load(x + i * x_stride + j) * k, x + i * x_stride + j);
  });
}

// Returns the maxima of neighbouring columns, one in each lane. `column` points to the first element of the
// first column, and each column has `rows` elements. Lane i of the result is the largest of the elements of
// column i and lane i of `before`. The loop keeps four separate maxima for each column. With only one, each
// comparison would have to wait for the result of the previous comparison.
template <class Span>
inline Vec<float> largest_of_column(size_t rows, const float* column, size_t stride, Vec<float> before,
                                    const Span& span) {
  Vec<float> m[4] = {before, before, before, before};
  size_t i = 0;
  for (; i + 4 <= rows; i += 4)
#pragma GCC unroll 4
    for (size_t k = 0; k < 4; ++k) m[k] = max(m[k], span.load(column + (i + k) * stride));
  for (; i < rows; ++i) m[0] = max(m[0], span.load(column + i * stride));
  return max(max(m[0], m[1]), max(m[2], m[3]));
}

inline void softmax_step(size_t rows, size_t n, float* s, size_t s_stride, float* largest, float* sum,
                         float* factor) {
  using V = Vec<float>;
  for_vectors(n, [&](size_t j, auto span) {
    float* column = s + j;
    const V before = span.load(largest + j);
    const V now = largest_of_column(rows, column, s_stride, before, span);
    V added = V::zero();
    for (size_t i = 0; i < rows; ++i) {
      const V p = exp(span.load(column + i * s_stride) - now);
      span.store(p, column + i * s_stride);
      added = added + p;
    }
    const V shrunk = exp(before - now);
    span.store(fma(span.load(sum + j), shrunk, added), sum + j);
    span.store(shrunk, factor + j);
    span.store(now, largest + j);
  });
}

// The backward pass of p = softmax(s) is ds = p (dp - delta) with delta = Σ p dp. The prefix d marks a
// gradient of the loss: ds is the gradient with respect to s. In attention, delta equals the dot product of
// dout and `out`, where `out` is the output of attention (Dao et al. 2022, section 3.1). The backward pass
// computes the probabilities p again, as exp(s - lse). `lse` is the logarithm of the sum of exp(s), from the
// forward pass. The backward pass also computes the scores s again, with rounding errors that may differ from
// those of the forward pass. A large s may then exceed `lse` by so much that exp(s - lse) overflows. So the
// code replaces a positive s - lse by 0.
inline void softmax_backward(size_t rows, size_t n, const float* lse, const float* delta, float* s, float* dp,
                             size_t stride) {
  using V = Vec<float>;
  for_vectors(n, [&](size_t j, auto span) {
    const V shift = span.load(lse + j), less = span.load(delta + j);
    for (size_t i = j; i < j + rows * stride; i += stride) {
      const V p = exp(min(V::zero(), span.load(s + i) - shift));
      span.store(p, s + i);
      span.store(p * (span.load(dp + i) - less), dp + i);
    }
  });
}

// Does the same as softmax_backward, but each column must hold the scores of all keys. This function computes
// delta and the sum of exp(s) itself, so the caller passes no `delta` and no `lse`. If a column holds a
// single score, p is exactly 1 and delta is exactly dp, so ds is 0.
inline void whole_softmax_backward(size_t rows, size_t n, float* s, float* dp, size_t stride) {
  using V = Vec<float>;
  // If all elements of a column are -Inf, `sum` is 0. The code then divides by kLeast instead of `sum`.
  constexpr float kLowest = -3.40282347e38f, kLeast = 0x1p-126f;
  for_vectors(n, [&](size_t j, auto span) {
    const size_t end = j + rows * stride;
    const V top = largest_of_column(rows, s + j, stride, V(V::broadcast(kLowest)), span);
    V sum = V::zero(), products = V::zero();
    for (size_t i = j; i < end; i += stride) {
      const V p = exp(span.load(s + i) - top);
      span.store(p, s + i);
      sum = sum + p;
      products = fma(p, span.load(dp + i), products);
    }
    const V factor = V(V::broadcast(1)) / max(V(V::broadcast(kLeast)), sum), delta = products * factor;
    for (size_t i = j; i < end; i += stride) {
      const V p = span.load(s + i) * factor;
      span.store(p, s + i);
      span.store(p * (span.load(dp + i) - delta), dp + i);
    }
  });
}

}  // namespace nplora::kernels::NPLORA_ISA
