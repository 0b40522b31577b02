// Blocks of W with scale A B added, for the products of large batches.
#pragma once

#include <algorithm>

#include "kernels/kernel_table.h"
#include "ops/lora.h"
#include "ops/scratch.h"

namespace nplora {

// Rows of A are scaled once for each block: `out` (rows, r).
template <class T>
const T* scaled_rows(Matrix<const T> a, Range rows, double scale, T* out) {
  for (size_t i = 0; i < rows.count; ++i)
    for (size_t j = 0; j < a.cols; ++j) out[i * a.cols + j] = T(scale) * a.row(rows.first + i)[j];
  return out;
}

// The panels of a block, which may lie in `out` already, with scale A[rows] B[:, cols] added, in `out`.
template <class T>
kernels::Panels<T> fold(const LowRank<T>& low, Range rows, Range cols, kernels::Panels<T> from, T* out) {
  using kernels::kPanelColumns;
  const size_t rank = low.a.cols, row_stride = std::min(kPanelColumns, cols.count);
  const T* scaled = scaled_rows(low.a, rows, low.scale, scratch<T>(Scratch::kFactor, rows.count * rank));
  const kernels::Panels<T> to{out, row_stride, rows.count * kPanelColumns};
  for (size_t c = 0; c < cols.count; c += kPanelColumns) {
    const size_t width = std::min(kPanelColumns, cols.count - c);
    const T* panel = from.data + c / kPanelColumns * from.panel_stride;
    T* sum = out + c / kPanelColumns * to.panel_stride;
    for (size_t i = 0; i < rows.count && panel != sum; ++i)
      std::copy_n(panel + i * from.row_stride, width, sum + i * row_stride);
    kernels::table().tiles<T>().outer_tile(rows.count, width, rank, {scaled, rank, 1},
                                           low.b.data + cols.first + c, low.b.stride, sum, row_stride, true,
                                           {});
  }
  return to;
}

}  // namespace nplora
