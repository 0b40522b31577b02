// Products by outer_tile, whose rows are tokens (or a rank) and whose columns lie in the SIMD lanes.
#pragma once

#include <algorithm>
#include <type_traits>

#include "base/matrix.h"
#include "base/range.h"
#include "kernels/kernel_table.h"
#include "ops/blocking.h"
#include "ops/scratch.h"

namespace nplora {

template <class E, class W>
const auto& outer_tile() {
  if constexpr (std::is_same_v<E, W>)
    return kernels::table().tiles<E>().outer_tile;
  else if constexpr (kernels::kSteps<E> > 1)
    return kernels::table().small<E>().outer_tile;
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

// out (n, w.rows) = x (n, depth) wᵀ for a thin w (w.rows, depth), a small batch of x at a time, so that no lane is idle where w
// has fewer rows than a vector has lanes.
template <class T>
void dot_product(Matrix<const T> x, Matrix<const T> w, T* out) {
  const auto& k = kernels::table().products<T>();
  const size_t lanes = k.lanes / 2, most = small_batch<T>();
  T* xs = scratch<T>(Scratch::kDotInputs, lanes * w.cols);
  T* part = scratch<T>(Scratch::kDotSums, w.rows * lanes);
  for (size_t i = 0; i < x.rows; i += most) {
    const size_t rows = std::min(most, x.rows - i), phases = kernels::small_phases(rows, lanes);
    k.interleave(rows, phases, w.cols, x.row(i), x.stride, xs);
    kernels::table().small<T>().dots(phases, w.rows, w.cols, {w.data, w.stride, kernels::kPanelColumns}, xs,
                                     part, false);
    k.sum_parts(rows, phases, w.rows, part, nullptr, out + i * w.rows, w.rows);
  }
}

// out (cols, rows) = scale * m (rows, cols) transposed.
template <class T>
void transpose_scaled(Matrix<const T> m, double scale, T* out) {
  for (size_t i = 0; i < m.rows; ++i)
    for (size_t j = 0; j < m.cols; ++j) out[j * m.rows + i] = T(scale) * m.row(i)[j];
}

}  // namespace nplora
