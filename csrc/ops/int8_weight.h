// The int8 operands of the matrix products for large batches: the weight W, and the rows of x (in a forward
// pass) or of dy (in a backward pass). A product converts W to int8 codes one block at a time, in scratch
// memory. After a call of keep_codes, the int8 codes of all of W are in memory, and products no longer
// convert W. The int8 codes of a row of W have one scale, whatever the storage format of W. (Small batches
// are different: their int8 products use the codes and scales of low-bit blocks directly, see
// kernels::Int8Products.)
#pragma once

#include <atomic>
#include <memory>

#include "base/aligned_buffer.h"
#include "base/matrix.h"
#include "base/range.h"
#include "base/shared_slot.h"
#include "kernels/kernel_table.h"
#include "ops/scratch.h"
#include "ops/weight.h"

namespace nplora {

// The int8 codes of all of W, in memory. W is divided into blocks of kInt8PanelColumns rows. The codes of a
// block are an array (ceil(d_in / 4), kInt8PanelColumns) of Int8Quad, as transposed_quads writes it.
class KeptCodes {
 public:
  // Converts all of `w` to int8 codes. Int8Form::find_scales must have computed the scales of `w` before.
  explicit KeptCodes(const WeightView& w);

  // The address of the element that holds the codes of columns `col` to `col` + 3 in row `row`. `row` is a
  // multiple of kInt8PanelColumns, and `col` is a multiple of four.
  const kernels::Int8Quad* at(size_t row, size_t col) const;

  // The size of the codes of `w`, in bytes.
  static size_t bytes(const WeightView& w);

 private:
  size_t block_;  // the number of quads of a block
  AlignedBuffer codes_;
};

// The data for int8 products with W: the scales of the rows of W, and the codes of W if keep_codes has stored
// them. Computing the scales reads all of W, which may be in a mapped file. So the scales are computed only
// when a product or keep_codes first needs them; text generation never needs them.
class Int8Form {
 public:
  Int8Form() = default;
  ~Int8Form() { delete[] scales_.load(); }
  Int8Form(const Int8Form&) = delete;
  Int8Form& operator=(const Int8Form&) = delete;

  // Computes the scales of `w`, unless they have been computed before. Several threads may call find_scales
  // at the same time. Each thread then computes all scales, and the first result is stored.
  void find_scales(const WeightView& w);

  // The scales (d_out), or null if they have not been computed yet. The scale of a row is the largest
  // magnitude in the row, divided by 127. The scale is 0 if all magnitudes are below 2^-119, and NaN if an
  // element is NaN or infinite.
  const float* scales() const { return scales_.load(std::memory_order_acquire); }

  // Computes the codes of `w` and stores them, so that products do not convert W again. Does nothing if the
  // codes are already stored.
  void keep_codes(const WeightView& w);

  // Drops the codes that keep_codes has stored. The memory of the codes is freed when no product reads the
  // codes any more. If another thread calls keep_codes at the same time, this object may hold codes again
  // afterwards.
  void drop_codes() { codes_.set(nullptr); }

  // The codes that keep_codes has stored, or null. While a product reads the codes, it holds this pointer. So
  // another thread may call drop_codes at any time.
  std::shared_ptr<const KeptCodes> codes() const { return codes_.get(); }

 private:
  std::atomic<float*> scales_ = nullptr;
  SharedSlot<KeptCodes> codes_;
};

// Int8 products sum over the depth in blocks of at most kInt8Depth values. int8_depth_block returns the size
// of these blocks, in values, for a product with the depth `depth`. If `depth` is at most kInt8Depth, there
// is only one block. A longer depth is cut into blocks of about equal size. The size is a multiple of
// kInt8DepthUnit.
inline constexpr size_t kInt8DepthUnit = 192;  // a multiple of 2 * kPanelColumns and of kInt8Group
static_assert(kernels::kInt8Depth % kInt8DepthUnit == 0);
static_assert(kInt8DepthUnit % kDecodedColumns == 0 && kInt8DepthUnit % kernels::kInt8Group == 0);
inline size_t int8_depth_block(size_t depth) {
  const size_t blocks = std::max<size_t>(1, ceil_div(depth, kernels::kInt8Depth));
  return round_up(std::max<size_t>(1, ceil_div(depth, blocks)), kInt8DepthUnit);
}

// The rows of x (or of dy) of one token block, quantised to int8. A row has `cols` values. Each group of
// `group` neighbouring values in a row has one scale.
class CodedBlock {
 public:
  CodedBlock() = default;
  CodedBlock(size_t cols, size_t group) : cols_(cols), group_(group) {}

  // The memory for `rows` rows, in bytes.
  size_t bytes(size_t rows) const { return rows * (groups() * (sizeof(float) + sizeof(int32_t)) + stride()); }

  // Sets the memory in which `rows` rows are stored. `memory` must have at least bytes(rows) bytes.
  void place(size_t rows, void* memory);

  // Quantises x (cols), and stores the result as row `row`. If `w_scales` (cols) is not null, each element of
  // x is first multiplied by the corresponding element of `w_scales`.
  void quantize(size_t row, const float* x, const float* w_scales) const;

  // Quantises like `quantize`, but rounds stochastically. The random bits depend on `seed`, on `random_row`
  // and on the column.
  void dither(size_t row, uint64_t seed, size_t random_row, const float* x, const float* w_scales) const;

  // The stored rows, beginning at row `row` and column `col`. `col` must be a multiple of `group`.
  kernels::CodedRows from(size_t row, size_t col) const;

 private:
  size_t stride() const;
  size_t groups() const { return ceil_div(cols_, group_); }

  size_t cols_ = 0, group_ = 1;
  int8_t* codes_ = nullptr;
  float* scales_ = nullptr;
  int32_t* corrections_ = nullptr;
};

// Writes the int8 codes of W[rows, cols], in the layout of forward products, to out (ceil(cols / 4),
// kInt8PanelColumns). Element (q, i) of `out` holds the codes of columns 4q to 4q + 3 in row i, where rows
// and columns are counted from the start of the block. There are at most kInt8PanelColumns rows, and the
// first column is a multiple of kInt8DepthUnit.
void transposed_quads(const WeightView& w, Range rows, Range cols, kernels::Int8Quad* out);

// Writes the int8 codes of W[rows, cols], in the layout of backward products, to out (ceil(rows / 4),
// kPanelColumns). Element (q, j) of `out` holds the codes of rows 4q to 4q + 3 in column j, where rows and
// columns are counted from the start of the block. If there are more than kPanelColumns columns, `out`
// consists of two arrays of this shape, one after the other. The first row is a multiple of
// kInt8PanelColumns. The first column is a multiple of kPanelColumns, and there are at most kDecodedColumns
// columns. If `kept` is not null, it must hold the codes of `w`. The function then only changes the layout of
// these codes. If `kept` is null, the function computes the codes from `w`.
ColumnBlock<kernels::Int8Quad> column_quads(const WeightView& w, const KeptCodes* kept, Range rows,
                                            Range cols, kernels::Int8Quad* out);

}  // namespace nplora
