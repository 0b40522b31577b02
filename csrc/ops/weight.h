// The frozen matrix W (d_out, d_in): owned and packed in its storage format, or a caller's row-major array.
#pragma once

#include <cstdint>

#include "base/aligned_buffer.h"
#include "base/matrix.h"
#include "base/range.h"
#include "kernels/kernel_table.h"
#include "ops/storage.h"

namespace nplora {

// What the products of a weight are computed in: its own float type, or (batches above kFloatBatch rows) pairs of bfloat16
// summed in float.
enum class Compute { kFloat, kBfloat16 };

// W as the products read it. Packed: panels of kPanelColumns columns, rows contiguous inside a panel, the last panel as
// narrow as it is (unpadded). Else row-major.
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

// The first column of the last, narrower panel, or d_in where there is none. A row_block must not straddle it.
inline size_t full_columns(size_t d_in) {
  return d_in / kernels::kPanelColumns * kernels::kPanelColumns;
}

// Where element (row, col) of packed W lies, col a multiple of kPanelColumns.
const char* stored_at(const WeightView& w, size_t row, size_t col);

// Whether the blocks of W lie in memory as elements E: else they are decoded.
template <class E>
bool in_place(const WeightView& w);

// A block of W in elements E, its first column a multiple of kPanelColumns: in place where W is stored so, else decoded into
// scratch (rows * cols elements). Bf16 is for that storage only. Bf16Pair pairs neighbours along a row: lane_tile runs along the rows of W.
template <class E>
kernels::Panels<E> row_block(const WeightView& w, Range rows, Range cols, E* scratch);

// The same for outer_tile, which runs down the columns of W, so that Bf16Pair pairs neighbours there. At most one panel wide.
template <class E>
struct ColumnBlock {
  const E* data;
  size_t row_stride;
};
template <class E>
ColumnBlock<E> column_block(const WeightView& w, Range rows, Range cols, E* scratch);

template <>
kernels::Panels<kernels::Bf16> row_block(const WeightView&, Range, Range, kernels::Bf16*);
template <>
kernels::Panels<kernels::Bf16Pair> row_block(const WeightView&, Range, Range, kernels::Bf16Pair*);
template <>
ColumnBlock<kernels::Bf16> column_block(const WeightView&, Range, Range, kernels::Bf16*);
template <>
ColumnBlock<kernels::Bf16Pair> column_block(const WeightView&, Range, Range, kernels::Bf16Pair*);

class PackedWeight {
 public:
  // From T = float or double values (rounded to the storage format), or from the bit patterns of a 16-bit format.
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
