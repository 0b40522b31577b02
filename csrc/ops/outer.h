// Products by outer_tile, whose rows are tokens (or a rank) and whose columns lie in the SIMD lanes.
#pragma once

#include <algorithm>
#include <type_traits>

#include "kernels/kernel_table.h"

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

// out (cols, rows) = scale * m (rows, cols) transposed.
template <class T>
void transpose_scaled(Matrix<const T> m, double scale, T* out) {
  for (size_t i = 0; i < m.rows; ++i)
    for (size_t j = 0; j < m.cols; ++j) out[j * m.rows + i] = T(scale) * m.row(i)[j];
}

}  // namespace nplora
