// Converts activations and factors to the element type of a product: floats stay floats or become pairs of
// bfloat16 values, and doubles stay doubles.
#pragma once

#include <cstddef>

#include "base/matrix.h"
#include "base/range.h"
#include "kernels/kernel_table.h"
#include "ops/scratch.h"

namespace nplora {

// The number of elements of type E that hold n values: n, or n / 2 rounded up if an element is a pair.
template <class E>
size_t depth_of(size_t n) {
  return ceil_div(n, kernels::kValuesPerElement<E>);
}

// Stores the transpose of x (rows, cols) in xt (depth_of<E>(cols), n_lanes), as elements of type E. n_lanes
// must be at least the number of rows. Lanes without a row are set to 0.
template <class E>
void lanes_of(size_t n_lanes, Matrix<const kernels::Sum<E>> x, E* xt) {
  const auto& k = kernels::table().products<kernels::Sum<E>>();
  if constexpr (kernels::kValuesPerElement<E> == 1) {
    k.to_lanes(n_lanes, x.rows, x.cols, x.data, x.stride, xt);
  } else {
    float* chunk = scratch<float>(Scratch::kPairing, kernels::kPanelColumns * n_lanes);
    for (size_t c = 0; c < x.cols; c += kernels::kPanelColumns) {
      const size_t cols = std::min(kernels::kPanelColumns, x.cols - c);
      k.to_lanes(n_lanes, x.rows, cols, x.data + c, x.stride, chunk);
      kernels::table().convert.pair_rows(cols, n_lanes, chunk, n_lanes, xt + c / 2 * n_lanes);
    }
  }
}

// Converts the matrix m (rows, cols) to bfloat16. Each element of `out` is a pair of neighbouring values of
// one row. The rows of `out` are `depth` pairs apart. If a row has an odd number of values, the last value is
// paired with zero.
template <class E>
void elements_of(Matrix<const float> m, E* out, size_t depth) {
  for (size_t i = 0; i < m.rows; ++i) {
    E* row = out + i * depth;
    if (m.cols % 2) row[depth_of<E>(m.cols) - 1] = E(0);
    kernels::table().convert.narrow_bfloat16(m.cols, m.row(i), reinterpret_cast<uint16_t*>(row));
  }
}

// Returns the elements of type E for the values of m. If E is Bf16Pair, they are written to `out` (see
// elements_of). Every other E needs no conversion, and the result is m itself.
template <class E>
kernels::Strided<E> elements_or_self(Matrix<const kernels::Sum<E>> m, E* out) {
  if constexpr (kernels::kValuesPerElement<E> == 1) {
    return {m.data, m.stride, 1};
  } else {
    elements_of<E>(m, out, depth_of<E>(m.cols));
    return {out, depth_of<E>(m.cols), 1};
  }
}

// Returns the elements of type E for the values of m (rows, cols). If E is Bf16Pair, two neighbours in a
// column form a pair, and the pairs (depth_of(rows), cols) are written to `out`. Every other E needs no
// conversion, and the result is m itself.
template <class E>
Matrix<const E> pairs_down_columns(Matrix<const kernels::Sum<E>> m, E* out) {
  if constexpr (kernels::kValuesPerElement<E> == 1) {
    return m;
  } else {
    kernels::table().convert.pair_rows(m.rows, m.cols, m.data, m.stride, out);
    return {out, depth_of<E>(m.rows), m.cols, m.cols};
  }
}

}  // namespace nplora
