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

// out (n, rows) = x (n, depth) wᵀ for a thin w (rows, depth), a small batch of x at a time, so that no lane is idle where w has
// fewer rows than a vector has lanes. depth counts elements; the steps of x and w are 1.
template <class E>
void dot_product(size_t n, size_t rows, size_t depth, kernels::Strided<E> x, kernels::Strided<E> w,
                 kernels::Sum<E>* out) {
  using T = kernels::Sum<E>;
  const auto& k = kernels::table().products<T>();
  const size_t lanes = k.lanes / 2, most = small_batch<T>(), phases = kernels::small_phases(most, lanes);
  E* xs = scratch<E>(Scratch::kDotInputs, lanes * ceil_div(depth, phases));
  T* part = scratch<T>(Scratch::kDotSums, rows * lanes);
  for (size_t i = 0; i < n; i += most) {
    const size_t count = std::min(most, n - i);
    k.interleave(count, phases, depth, reinterpret_cast<const T*>(x.data + i * x.row_stride), x.row_stride,
                 reinterpret_cast<T*>(xs));  // pairs are moved as floats are
    kernels::table().small<E>().dots(phases, rows, depth, {w.data, w.row_stride, kernels::kPanelDepth<E>}, xs,
                                     part, false);
    k.sum_parts(count, phases, rows, part, nullptr, out + i * rows, rows);
  }
}

// body(i, j) for the elements of a tall matrix (rows, cols), in the order that suits its transpose too: the rows of that lie far
// apart, often in the same places of L1, so that of each a whole line is finished at a time.
template <class Body>
void for_transposed(size_t rows, size_t cols, const Body& body) {
  constexpr size_t kLine = 16;
  for (size_t first = 0; first < rows; first += kLine)
    for (size_t j = 0; j < cols; ++j)
      for (size_t i = first, end = std::min(first + kLine, rows); i < end; ++i) body(i, j);
}

// out (cols, rows) = scale * m (rows, cols) transposed.
template <class T>
void transpose_scaled(Matrix<const T> m, double scale, T* out) {
  for_transposed(m.rows, m.cols, [&](size_t i, size_t j) { out[j * m.rows + i] = T(scale) * m.row(i)[j]; });
}

}  // namespace nplora
