// The frozen matrix W (d_out, d_in). The library holds it packed in its storage format, or it is in the
// caller's memory (often a mapped file) as a row-major array or low-bit blocks. Blocks are decoded a part at
// a time, never as a whole.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>

#include "base/aligned_buffer.h"
#include "base/matrix.h"
#include "base/range.h"
#include "kernels/kernel_table.h"
#include "ops/storage.h"

namespace nplora {

// The arithmetic of a weight's products. kFloat: the weight's own float type. kBfloat16: pairs of bfloat16
// summed in float, for batches above kFloatBatch rows. kInt8: small batches of a forward pass with GGUF's
// blocks in int8, all else like kBfloat16.
enum class Compute { kFloat, kBfloat16, kInt8 };

// W in the form that the products read. Packed: panels of kPanelColumns columns with contiguous rows; the
// last panel is narrower and not padded. Otherwise row-major, or rows of blocks, or NF4, whose blocks ignore
// rows.
struct WeightView {
  Storage storage;
  bool packed;
  const void* data;
  size_t d_out, d_in;
  size_t row_stride;  // for row-major data in elements, for blocks in bytes
  Compute compute = Compute::kFloat;
  kernels::Nf4 nf4{};
};

template <class T>
WeightView view_of(Matrix<const T> w) {
  return {sizeof(T) == 4 ? Storage::kFloat32 : Storage::kFloat64, false, w.data, w.rows, w.cols, w.stride};
}

// The first column of the last, narrower panel, or d_in if all panels are full. A row_block must not span
// this column, unless its elements are Bf16Pair.
inline size_t full_columns(size_t d_in) {
  return d_in / kernels::kPanelColumns * kernels::kPanelColumns;
}

// The address of element (row, col) of packed W. col is a multiple of kPanelColumns.
const char* stored_at(const WeightView& w, size_t row, size_t col);

// Whether W is in memory as elements E. Otherwise it is decoded.
template <class E>
bool in_place(const WeightView& w);

// The elements of scratch per row that this many columns of W may take. Blocks are decoded in whole
// sub-blocks, and rows have a distance at which they do not evict each other.
inline constexpr size_t scratch_columns(size_t cols) {
  return cols + kernels::kPanelColumns;
}

// Rows and columns of W in elements E. The first column is a multiple of kPanelColumns. The block is in place
// if W is stored as elements E; otherwise it is decoded into scratch (rows * scratch_columns(cols) elements).
// If many tokens share the block and W is not packed, it is copied too: rows that are a power of two apart
// would evict each other from the cache. Bf16 is for bfloat16 storage only, in place. Bf16Pair pairs
// neighbours along a row, because gemm_tokens_in_lanes reads along the rows of W.
template <class E>
kernels::Panels<E> row_block(const WeightView& w, Range rows, Range cols, bool shared, E* scratch);

// The block for gemm_outputs_in_lanes, which reads down the columns of W, so Bf16Pair pairs neighbours down a
// column. cols is one panel or, if makes_two_panels, up to kDecodedColumns that start at a multiple of
// kDecodedColumns. Two panels are stored one after the other, because the hardware would also fetch gaps
// between rows. (NF4 keeps the gaps if d_in is not a multiple of 16.)
inline constexpr size_t kDecodedColumns = 2 * kernels::kPanelColumns;  // whole sub-blocks
inline bool makes_two_panels(const WeightView& w, bool shared) {
  return is_blocks(w.storage) || (!w.packed && shared);
}
template <class E>
struct ColumnBlock {
  const E* data;
  size_t row_stride, panel_stride = kernels::kPanelColumns;
};
template <class E>
ColumnBlock<E> column_block(const WeightView& w, Range rows, Range cols, bool shared, E* scratch);

template <>
kernels::Panels<kernels::Bf16> row_block(const WeightView&, Range, Range, bool, kernels::Bf16*);
template <>
kernels::Panels<kernels::Bf16Pair> row_block(const WeightView&, Range, Range, bool, kernels::Bf16Pair*);
template <>
ColumnBlock<kernels::Bf16> column_block(const WeightView&, Range, Range, bool, kernels::Bf16*);
template <>
ColumnBlock<kernels::Bf16Pair> column_block(const WeightView&, Range, Range, bool, kernels::Bf16Pair*);

// Whether dots_of_blocks accepts W: low-bit blocks, with a whole number of them in each row.
bool dots_blocks(const WeightView& w);

// Whether small batches are multiplied with W in int8.
inline bool dots_int8(const WeightView& w) {
  return w.compute == Compute::kInt8 && is_blocks(w.storage) && w.storage != Storage::kNf4;
}

// part (m, rows, lanes / 2) = x W[rows]ᵀ, one sum for each lane, as BlockDots computes it.
void dots_of_blocks(const WeightView& w, Range rows, Matrix<const float> x, float* part,
                    const kernels::Fetch& next);

// y (m, rows) = x W[rows]ᵀ for x in int8.
void int8_dots_of_blocks(const WeightView& w, Range rows, size_t m, const kernels::Int8Rows& x, float* y,
                         const kernels::Fetch& next);

class PackedWeight {
 public:
  // W in its storage layout, in memory that lives as long as its owner.
  PackedWeight(const WeightView& w, std::shared_ptr<const void> owner) : owner_(std::move(owner)), view_(w) {}

  // From values of type T = float or double, rounded to the storage format, or from bit patterns of a 16-bit
  // format.
  template <class T>
  PackedWeight(Matrix<const T> w, Storage storage, Compute compute);

  const WeightView& view() const { return view_; }
  Storage storage() const { return view_.storage; }
  Compute compute() const { return view_.compute; }
  size_t d_out() const { return view_.d_out; }
  size_t d_in() const { return view_.d_in; }
  size_t nbytes() const;

  // out (d_out, d_in), in float (double for kFloat64) or the bit patterns of a 16-bit format.
  template <class T>
  void unpack(Matrix<T> out) const;

  // out (n, d_in) = W[ids].   ids must be in range.
  template <class T>
  void gather_rows(const int64_t* ids, Matrix<T> out) const;

  // out (d_out) = the squared norm of each row.
  void row_sums_of_squares(double* out) const;

 private:
  AlignedBuffer buffer_;
  std::shared_ptr<const void> owner_;
  WeightView view_;
};

}  // namespace nplora
