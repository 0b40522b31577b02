// The frozen matrix W (d_out, d_in): owned and packed in its storage format, or a caller's row-major array.
#pragma once

#include <cstdint>

#include "base/aligned_buffer.h"
#include "base/matrix.h"
#include "kernels/kernel_table.h"

namespace nplora {

enum class Storage { kFloat32, kFloat64, kBfloat16, kFloat16 };

// What the products of a weight are computed in: its own float type, or pairs of bfloat16 summed in float.
enum class Compute { kFloat, kBfloat16 };

size_t bytes_per_element(Storage storage);

// W as the products read it. Packed: panels of kPanelColumns columns, rows contiguous inside a panel, the
// last panel as narrow as it is (unpadded). Else row-major.
struct WeightView {
  Storage storage;
  bool packed;
  const void* data;
  size_t d_out, d_in;
  size_t row_stride;  // of row-major data
  Compute compute = Compute::kFloat;
};

template <class T>
WeightView view_of(Matrix<const T> w) {
  return {sizeof(T) == 4 ? Storage::kFloat32 : Storage::kFloat64, false, w.data, w.rows, w.cols, w.stride};
}

// The first column of the last, narrower panel, or d_in where there is none. A block must not straddle it.
inline size_t full_columns(size_t d_in) {
  return d_in / kernels::kPanelColumns * kernels::kPanelColumns;
}

// Rows [row, row + rows) and columns [col, col + cols) of W in elements E, col a multiple of kPanelColumns. In place where W is
// stored so, else decoded into scratch (rows * cols elements). Bf16Pair pairs neighbours along a row.
template <class E>
kernels::Panels<E> block(const WeightView& w, size_t row, size_t rows, size_t col, size_t cols, E* scratch);

// One panel as the outer product wants it: `rows` counts along the depth, so Bf16Pair pairs neighbours down a column.
template <class E>
struct Panel {
  const E* data;
  size_t row_stride;
};
template <class E>
Panel<E> column_block(const WeightView& w, size_t row, size_t rows, size_t col, size_t cols, E* scratch);

// The explicit forms for pairs, defined in weight.cpp.
template <>
kernels::Panels<kernels::Bf16Pair> block(const WeightView&, size_t, size_t, size_t, size_t,
                                         kernels::Bf16Pair*);
template <>
Panel<kernels::Bf16Pair> column_block(const WeightView&, size_t, size_t, size_t, size_t, kernels::Bf16Pair*);

class PackedWeight {
 public:
  // From T = float or double values (rounded to the storage format), or from the bit patterns of a 16-bit
  // format.
  template <class T>
  PackedWeight(Matrix<const T> w, Storage storage, Compute compute);

  WeightView view() const { return {storage_, true, buffer_.as<void>(), d_out_, d_in_, 0, compute_}; }
  Storage storage() const { return storage_; }
  Compute compute() const { return compute_; }
  size_t d_out() const { return d_out_; }
  size_t d_in() const { return d_in_; }
  size_t nbytes() const { return d_out_ * d_in_ * bytes_per_element(storage_); }

  // out (d_out, d_in): float (double for kFloat64), or the bit patterns of a 16-bit format.
  template <class T>
  void unpack(Matrix<T> out) const;

  // out (n, d_in) = W[ids].  ids are in range.
  template <class T>
  void gather_rows(const int64_t* ids, Matrix<T> out) const;

  // out (d_out) = the squared norm of each row.
  void row_sums_of_squares(double* out) const;

 private:
  Storage storage_;
  Compute compute_;
  size_t d_out_, d_in_;
  AlignedBuffer buffer_;
};

}  // namespace nplora
