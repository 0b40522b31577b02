// Merges updates on the fly: for the products of large batches, adds scale * A * B (the update) to blocks of
// W.
#pragma once

#include <algorithm>

#include "kernels/kernel_table.h"
#include "ops/lora.h"
#include "ops/scratch.h"

namespace nplora {

// Writes some rows of A, times the scale, to out (rows, r).
template <class T>
const T* scaled_rows(Matrix<const T> a, Range rows, double scale, T* out) {
  for (size_t i = 0; i < rows.count; ++i)
    for (size_t j = 0; j < a.cols; ++j) out[i * a.cols + j] = T(scale) * a.row(rows.first + i)[j];
  return out;
}

// Writes a block of W plus scale A[rows] B[:, cols] to `out` (rows, cols). The block is at most one panel
// wide.
template <class T>
ColumnBlock<T> merged_block(const LowRank<T>& low, Range rows, Range cols, ColumnBlock<T> from, T* out) {
  const size_t rank = low.a.cols;
  const T* scaled = scaled_rows(low.a, rows, low.scale, scratch<T>(Scratch::kFactor, rows.count * rank));
  for (size_t i = 0; i < rows.count; ++i)
    std::copy_n(from.data + i * from.row_stride, cols.count, out + i * cols.count);
  kernels::table().tiles<T>().gemm_outputs_in_lanes(rows.count, cols.count, rank, {scaled, rank, 1},
                                                    low.b.data + cols.first, low.b.stride, out, cols.count,
                                                    true, kernels::Fetch::none());
  return {out, cols.count};
}

}  // namespace nplora
