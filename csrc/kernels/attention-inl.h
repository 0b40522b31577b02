// The softmax of attention and the moves around its products: queries lie in the SIMD lanes, so that nothing is summed across lanes.
// See kernel_table.h for the contract.

namespace nplora::kernels::NPLORA_ISA {

inline void transpose(size_t rows, size_t cols, const float* x, size_t x_stride, float* xt,
                      size_t xt_stride) {
  constexpr size_t kLanes = Vec<float>::kLanes;
  for (size_t r = 0; r < rows; r += kLanes)
    for (size_t c = 0; c < cols; c += kLanes) {
      const size_t height = smaller(rows - r, kLanes), width = smaller(cols - c, kLanes);
      const float* from = x + r * x_stride + c;
      float* to = xt + c * xt_stride + r;
      Vec<float> block[kLanes];
#pragma GCC unroll 16
      for (size_t i = 0; i < kLanes; ++i)
        block[i] = i >= height       ? Vec<float>::zero()
                   : width == kLanes ? Vec<float>::load(from + i * x_stride)
                                     : Vec<float>::load_partial(from + i * x_stride, width);
      transpose(block);
#pragma GCC unroll 16
      for (size_t i = 0; i < kLanes; ++i) {
        if (i >= width) break;
        if (height == kLanes)
          block[i].store(to + i * xt_stride);
        else
          block[i].store_partial(to + i * xt_stride, height);
      }
    }
}

inline void scale_columns(size_t rows, size_t n, const float* factor, float* x, size_t x_stride) {
  for_vectors(n, [&](size_t j, auto span) {
    const Vec<float> k = span.load(factor + j);
    for (size_t i = 0; i < rows; ++i) span.store(span.load(x + i * x_stride + j) * k, x + i * x_stride + j);
  });
}

inline void softmax_step(size_t rows, size_t n, float* s, size_t s_stride, float* largest, float* sum,
                         float* factor) {
  using V = Vec<float>;
  for_vectors(n, [&](size_t j, auto span) {
    float* column = s + j;
    const V before = span.load(largest + j);
    V m[4] = {before, before, before, before};  // side by side: a maximum waits for the one before it
    size_t i = 0;
    for (; i + 4 <= rows; i += 4)
#pragma GCC unroll 4
      for (size_t k = 0; k < 4; ++k) m[k] = max(m[k], span.load(column + (i + k) * s_stride));
    for (; i < rows; ++i) m[0] = max(m[0], span.load(column + i * s_stride));
    const V now = max(max(m[0], m[1]), max(m[2], m[3]));
    V added = V::zero();
    for (i = 0; i < rows; ++i) {
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

// p = softmax(s): ds = p (dp - Σ p dp), whose sum is delta = Σ dout out (Dao et al. 2022, section 3.1).
inline void softmax_backward(size_t rows, size_t n, const float* lse, const float* delta, float* s, float* dp,
                             size_t stride) {
  using V = Vec<float>;
  for_vectors(n, [&](size_t j, auto span) {
    const V shift = span.load(lse + j), less = span.load(delta + j);
    for (size_t i = j; i < j + rows * stride; i += stride) {
      const V p = exp(span.load(s + i) - shift);
      span.store(p, s + i);
      span.store(p * (span.load(dp + i) - less), dp + i);
    }
  });
}

}  // namespace nplora::kernels::NPLORA_ISA
