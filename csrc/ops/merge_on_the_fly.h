// Merges updates on the fly: adds the update scale * A B to a copy of a block of W, before a large batch is
// multiplied by the copy.
#pragma once

#include <algorithm>

#include "kernels/kernel_table.h"
#include "ops/lora.h"
#include "ops/scratch.h"

namespace nplora {

// Writes scale * A[rows] to out (rows.count, r), and returns `out`.
template <class T>
const T* scaled_rows(Matrix<const T> a, Range rows, double scale, T* out) {
  for (size_t i = 0; i < rows.count; ++i)
    for (size_t j = 0; j < a.cols; ++j) out[i * a.cols + j] = T(scale) * a.row(rows.first + i)[j];
  return out;
}

// Writes W[rows, cols] + scale A[rows] B[:, cols] to `out` (rows.count, cols.count). `from` is the block
// W[rows, cols], which is at most one panel wide.
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
