// The frozen matrix W (d_out, d_in). Either the library holds W packed in its storage format, or W is in the
// caller's memory (often a mapped file) as a row-major array or low-bit blocks. Blocks are decoded a few at a
// time; the whole W is never decoded at once.
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

class Int8Form;

// The arithmetic of the products with a weight. With kFloat, products are computed in float64 if the weight
// is stored in float64, and in float32 otherwise. With kBfloat16, large batches use pairs of bfloat16, summed
// in float, and small batches use float32. Here, a batch is large if it has more than kSmallBatch rows in a
// forward pass, or more than kFloatBatch rows in a backward pass. kInt8 is like kBfloat16, with two
// differences: large batches are multiplied with W in int8 (see ops/int8_weight.h), and forward passes of
// small batches use int8 if W is in one of GGUF's block formats. The products with the LoRA factors A and B
// never use int8.
enum class Compute { kFloat, kBfloat16, kInt8 };

// W in the form in which the products read it. If `packed` is true, W is stored as panels of kPanelColumns
// columns with contiguous rows. The last panel may be narrower, and is not padded. If `packed` is false, W is
// stored as a row-major array, as rows of blocks, or in NF4. A block of NF4 may contain the end of one row
// and the start of the next row.
struct WeightView {
  Storage storage;
  bool packed;
  const void* data;
  size_t d_out, d_in;
  // The distance from one row to the next: in elements if W is row-major, in bytes if W is in blocks
  size_t row_stride;
  Compute compute = Compute::kFloat;
  kernels::Nf4 nf4{};
  Int8Form* int8 = nullptr;  // W for int8 products of large batches; not null if `compute` is kInt8
};

template <class T>
WeightView view_of(Matrix<const T> w) {
  return {sizeof(T) == 4 ? Storage::kFloat32 : Storage::kFloat64, false, w.data, w.rows, w.cols, w.stride};
}

// The number of columns in full panels. All other columns are in the last panel, which is narrower. The
// columns that are passed to row_block must be either all in full panels or all in the narrower panel. The
// exception is row_block<Bf16Pair>, which accepts columns of full panels together with those of the narrower
// panel.
inline size_t full_columns(size_t d_in) {
  return d_in / kernels::kPanelColumns * kernels::kPanelColumns;
}

// The address of element (row, col) of packed W. `col` is a multiple of kPanelColumns.
const char* stored_at(const WeightView& w, size_t row, size_t col);

// Returns true if W can be read in place as elements of type E. If the result is false, W must be decoded.
template <class E>
bool in_place(const WeightView& w);

// The number of elements of scratch memory that a decoded row of `cols` columns may take. The row may take
// more than `cols` elements, because blocks are decoded in whole sub-blocks, and because rows are spaced so
// that they do not evict each other from the cache.
inline constexpr size_t scratch_columns(size_t cols) {
  return cols + kernels::kPanelColumns;
}

// The block W[rows, cols] in elements of type E. The first column is a multiple of kPanelColumns. If the
// elements of W are stored as type E, the block is read in place. Otherwise, the block is decoded into
// `scratch` (rows * scratch_columns(cols) elements). `shared` means that many tokens use the block. If
// `shared` is true, the block of a row-major W is copied even if it needs no decoding. Without the copy, rows
// whose distance is a power of two would evict each other from the cache. The rows of a packed W do not evict
// each other, so `shared` has no effect on a packed W. The element type Bf16 is only for weights stored in
// bfloat16. With this type, the block is always read in place. If E is Bf16Pair, an element holds two
// neighbouring values of a row, because gemm_tokens_in_lanes sums along the rows of W.
template <class E>
kernels::Panels<E> row_block(const WeightView& w, Range rows, Range cols, bool shared, E* scratch);

// The block W[rows, cols] for gemm_outputs_in_lanes. If E is Bf16Pair, an element holds two neighbouring
// values of a column, because this kernel sums along the columns of W. If makes_two_panels is false, `cols`
// is one panel. If makes_two_panels is true, `cols` has up to kDecodedColumns columns, and starts at a
// multiple of kDecodedColumns. Two panels are stored one after the other. If each row contained the columns
// of both panels, the hardware would also prefetch the half of a row that the kernel does not need. (There is
// one exception: if W is in NF4 and d_in is not a multiple of 16, each row contains the columns of both
// panels.)
inline constexpr size_t kDecodedColumns = 2 * kernels::kPanelColumns;  // 96 columns, or three sub-blocks
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

// Returns true if encoded_block accepts W: W must be in low-bit blocks, but not in NF4.
inline bool encodes_blocks(const WeightView& w) {
  return is_blocks(w.storage) && w.storage != Storage::kNf4;
}

// The block W[rows, cols] in int8 codes (see kernels::Int8Gemm::encode). Row i is multiplied by inverses[i]
// before it is rounded to codes. `scratch` is memory for rows * scratch_columns(cols) codes. The returned
// matrix is in `scratch`. If the first column is a multiple of kDecodedColumns, the matrix begins at the
// start of `scratch`. Otherwise, the matrix may begin later.
Matrix<const uint8_t> encoded_block(const WeightView& w, Range rows, Range cols, const float* inverses,
                                    uint8_t* scratch);

// Whether dots_of_blocks accepts W: W must be in low-bit blocks, with a whole number of blocks in each row.
bool dots_blocks(const WeightView& w);

// Whether small batches are multiplied with W in int8.
inline bool dots_int8(const WeightView& w) {
  return w.compute == Compute::kInt8 && is_blocks(w.storage) && w.storage != Storage::kNf4;
}

// Multiplies a small batch x (m, d_in) by W[rows]ᵀ, where W is in low-bit blocks. The product of a row of x
// and a row of W is stored as lanes / 2 partial sums (see kernels::BlockDots), so `part` is
// (m, rows, lanes / 2). The kernel prefetches `next`.
void dots_of_blocks(const WeightView& w, Range rows, Matrix<const float> x, float* part,
                    const kernels::Fetch& next);

// Multiplies a small batch x (m, d_in), quantised to int8, by low-bit blocks of W: y (m, rows) = x W[rows]ᵀ.
void int8_dots_of_blocks(const WeightView& w, Range rows, size_t m, const kernels::Int8Rows& x, float* y,
                         const kernels::Fetch& next);

class PackedWeight {
 public:
  // Uses W where it is stored, without a copy. This object holds `owner`, which must keep the memory of W
  // alive.
  PackedWeight(const WeightView& w, std::shared_ptr<const void> owner);
  ~PackedWeight();

  // Packs a copy of w. If T is float or double, the values are rounded to the storage format. If T is
  // uint16_t, the values are bit patterns of a 16-bit format.
  template <class T>
  PackedWeight(Matrix<const T> w, Storage storage, Compute compute);

  const WeightView& view() const { return view_; }
  Storage storage() const { return view_.storage; }
  Compute compute() const { return view_.compute; }
  size_t d_out() const { return view_.d_out; }
  size_t d_in() const { return view_.d_in; }
  size_t nbytes() const;

  // Keeps the int8 codes of W in memory (see Int8Form::keep_codes). `compute` must be kInt8.
  void keep_int8() const;
  void drop_int8() const;
  bool keeps_int8() const;
  // The memory that the int8 codes of W take if they are kept, in bytes.
  size_t int8_nbytes() const;

  // Writes W to out (d_out, d_in). If W is stored as kFloat64, T is double. For all other storage formats, T
  // is float. For the two 16-bit formats, T may also be uint16_t; `out` then receives the bit patterns.
  template <class T>
  void unpack(Matrix<T> out) const;

  // out (n, d_in) = the rows W[ids]. All ids must be at least 0 and below d_out.
  template <class T>
  void gather_rows(const int64_t* ids, Matrix<T> out) const;

  // out (d_out) = the squared norm of each row.
  void row_sums_of_squares(double* out) const;

 private:
  AlignedBuffer buffer_;
  std::shared_ptr<const void> owner_;
  WeightView view_;
  std::unique_ptr<Int8Form> int8_;
};

}  // namespace nplora
