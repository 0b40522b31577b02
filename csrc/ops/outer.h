// Products by outer_tile, whose rows are tokens (or a rank) and whose columns lie in the SIMD lanes.
#pragma once

#include <algorithm>
#include <type_traits>

#include "base/matrix.h"
#include "base/range.h"
#include "kernels/kernel_table.h"
#include "ops/scratch.h"

namespace nplora {

template <class E, class W>
const auto& outer_tile() {
  if constexpr (std::is_same_v<E, W>)
    return kernels::table().tiles<E>().outer_tile;
  else
    return kernels::table().small<W>().outer_tile;
}

// c (m, cols) = [c +] a (m, depth) w (depth, cols).
template <class E>
void add_product(size_t m, size_t cols, size_t depth, kernels::Strided<E> a, const E* w, size_t w_stride,
                 kernels::Sum<E>* c, size_t c_stride, bool accumulate) {
  using kernels::kPanelColumns;
  for (size_t j = 0; j < cols; j += kPanelColumns)
    outer_tile<E, E>()(m, std::min(kPanelColumns, cols - j), depth, a, w + j, w_stride, c + j, c_stride,
                       accumulate, {});
}

// out (n, w.rows) = x (n, depth) wᵀ for a thin w (w.rows, depth): both run along the SIMD lanes, a few rows of x at a time, so
// that no lane is idle where w has fewer rows than a vector has lanes.
template <class T>
void dot_product(Matrix<const T> x, Matrix<const T> w, T* out) {
  constexpr size_t kRows = 8, kDepth = 16 * kernels::kPanelColumns, kOutputs = 64;
  const auto& k = kernels::table().products<T>();
  const size_t lanes = k.lanes / 2;
  T* xs = scratch<T>(Scratch::kDotInputs, kRows * round_up(w.cols, lanes));
  T* part = scratch<T>(Scratch::kDotSums, kRows * kOutputs * lanes);
  for (size_t i = 0; i < x.rows; i += kRows) {
    const size_t rows = std::min(kRows, x.rows - i);
    k.interleave(rows, w.cols, x.row(i), x.stride, xs);
    for (size_t j = 0; j < w.rows; j += kOutputs) {
      const size_t outputs = std::min(kOutputs, w.rows - j);
      if (w.cols == 0) std::fill_n(part, rows * outputs * lanes, T(0));
      for (size_t c = 0; c < w.cols; c += kDepth)
        kernels::table().small<T>().dots(rows, outputs, std::min(kDepth, w.cols - c),
                                         {w.row(j) + c, w.stride, kernels::kPanelColumns}, xs + c * rows,
                                         part, c > 0);
      k.sum_parts(rows, outputs, part, nullptr, out + i * w.rows + j, w.rows);
    }
  }
}

// out (cols, rows) = scale * m (rows, cols) transposed.
template <class T>
void transpose_scaled(Matrix<const T> m, double scale, T* out) {
  for (size_t i = 0; i < m.rows; ++i)
    for (size_t j = 0; j < m.cols; ++j) out[j * m.rows + i] = T(scale) * m.row(i)[j];
}

}  // namespace nplora
