// Matrix products that the kernel gemm_outputs_in_lanes computes (the columns of a result are in the SIMD
// lanes), and transposes.
#pragma once

#include <algorithm>
#include <type_traits>

#include "base/matrix.h"
#include "base/range.h"
#include "kernels/kernel_table.h"

namespace nplora {

// The kernel that multiplies elements of type E by a weight with elements of type W.
template <class E, class W>
const auto& gemm_outputs_in_lanes() {
  if constexpr (std::is_same_v<E, W>)
    return kernels::table().tiles<E>().gemm_outputs_in_lanes;
  else if constexpr (kernels::kValuesPerElement<E> > 1)
    return kernels::table().small<E>().gemm_outputs_in_lanes;
  else
    return kernels::table().small<W>().gemm_outputs_in_lanes;
}

// Computes c = a w, or c += a w if `accumulate` is set, for c (m, cols), a (m, depth) and w (depth, cols).
// The columns are computed panel by panel. If `next` is a Fetch::memory, its memory is prefetched during the
// product with the first panel. If `next` is Fetch::rows_ahead(), the product with each panel prefetches
// later rows of the same panel.
template <class E>
void add_product(size_t m, size_t cols, size_t depth, kernels::Strided<E> a, const E* w, size_t w_stride,
                 kernels::Sum<E>* c, size_t c_stride, bool accumulate,
                 kernels::Fetch next = kernels::Fetch::none()) {
  using kernels::kPanelColumns;
  for (size_t j = 0; j < cols; j += kPanelColumns) {
    gemm_outputs_in_lanes<E, E>()(m, std::min(kPanelColumns, cols - j), depth, a, w + j, w_stride, c + j,
                                  c_stride, accumulate, next);
    if (next.lines > 0) next = kernels::Fetch::none();
  }
}

// Returns the memory to prefetch while the rows `in_use` of m are in use: the rows that follow, at most
// in_use.count of them. If there are gaps between the rows of m, nothing is prefetched.
template <class T>
kernels::Fetch rows_after(Matrix<const T> m, Range in_use) {
  const size_t end = in_use.first + in_use.count, count = std::min(in_use.count, m.rows - end);
  if (m.stride != m.cols || count == 0) return kernels::Fetch::none();
  return kernels::Fetch::memory(m.row(end), count * m.cols * sizeof(T) / kCacheLine, 1);
}

// Calls body(i, j) for each element of a tall matrix (rows, cols), in an order that is fast for reading the
// matrix and for writing its transpose.
// The rows of the transpose are far apart and often evict each other from L1. So the loop writes one whole
// cache line of every row of the transpose, then the next cache line of every row, and so on.
template <class Body>
void for_transposed(size_t rows, size_t cols, const Body& body) {
  constexpr size_t kLine = 16;
  for (size_t first = 0; first < rows; first += kLine)
    for (size_t j = 0; j < cols; ++j)
      for (size_t i = first, end = std::min(first + kLine, rows); i < end; ++i) body(i, j);
}

// out (cols, rows) = m (rows, cols) transposed. The rows of `out` are `stride` elements apart.
template <class T>
void transpose(Matrix<const T> m, T* out, size_t stride) {
  kernels::table().products<T>().transpose(m.rows, m.cols, m.data, m.stride, out, stride);
}

}  // namespace nplora
