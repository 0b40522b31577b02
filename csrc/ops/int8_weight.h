// The operands of int8 products for large batches: W, and rows of x or dy. A block of W is converted from its
// storage format to int8 when a product copies the block to scratch memory, unless the codes of W are kept.
// Whatever the storage format, the int8 codes of a row of W have one common scale. (In contrast, int8
// products for small batches use the codes and scales of the low-bit blocks themselves, see
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

// The int8 codes of all of W, kept in memory. They consist of one block for every kInt8PanelColumns rows of
// W. A block has all columns of W, in the layout that transposed_quads writes.
class KeptCodes {
 public:
  // Converts all of `w`, whose scales must be known.
  explicit KeptCodes(const WeightView& w);

  // The codes, beginning at row `row` and column `col`. `row` is a multiple of kInt8PanelColumns, and `col`
  // is a multiple of four.
  const kernels::Int8Quad* at(size_t row, size_t col) const;

  // The memory for the codes of `w`, in bytes.
  static size_t bytes(const WeightView& w);

 private:
  size_t block_;  // the number of quads of a block
  AlignedBuffer codes_;
};

// W for int8 products: the scales of its rows, and its codes if they are kept. Computing the scales reads all
// of W, which may be in a mapped file. So the scales are computed only when a product or keep_codes first
// needs them; text generation never needs them.
class Int8Form {
 public:
  Int8Form() = default;
  ~Int8Form() { delete[] scales_.load(); }
  Int8Form(const Int8Form&) = delete;
  Int8Form& operator=(const Int8Form&) = delete;

  // Computes the scales of `w`, unless they are known. If several threads compute the scales at the same
  // time, one result is kept.
  void find_scales(const WeightView& w);

  // The scales (d_out), or null if they have not been computed yet. A scale is the largest magnitude in a
  // row, divided by 127. The scale is 0 if all magnitudes are below 2^-119, and NaN if an element is NaN or
  // infinite.
  const float* scales() const { return scales_.load(std::memory_order_acquire); }

  // Computes the codes of `w` and keeps them, so that products do not convert W again. Does nothing if the
  // codes are kept already.
  void keep_codes(const WeightView& w);

  // Forgets the kept codes, which are freed when no product reads them any more. If another thread calls
  // keep_codes at the same time, the codes may be kept again.
  void drop_codes() { codes_.set(nullptr); }

  // The kept codes, or null. A product holds the pointer while it reads the codes, so another thread may drop
  // the codes in the meantime.
  std::shared_ptr<const KeptCodes> codes() const { return codes_.get(); }

 private:
  std::atomic<float*> scales_ = nullptr;
  SharedSlot<KeptCodes> codes_;
};

// The depth of a block in int8 products, in values. If the depth of a product is at most kInt8Depth, there is
// only one block. A longer depth is cut into blocks of about equal size.
inline constexpr size_t kInt8DepthUnit = 192;  // a multiple of 2 * kPanelColumns and of kInt8Group
static_assert(kernels::kInt8Depth % kInt8DepthUnit == 0);
static_assert(kInt8DepthUnit % kDecodedColumns == 0 && kInt8DepthUnit % kernels::kInt8Group == 0);
inline size_t int8_depth_block(size_t depth) {
  const size_t blocks = std::max<size_t>(1, ceil_div(depth, kernels::kInt8Depth));
  return round_up(std::max<size_t>(1, ceil_div(depth, blocks)), kInt8DepthUnit);
}

// Rows of x, or of dy, for one token block, quantised to int8.
class CodedBlock {
 public:
  CodedBlock() = default;
  CodedBlock(size_t cols, size_t group) : cols_(cols), group_(group) {}

  // The memory for `rows` rows, in bytes.
  size_t bytes(size_t rows) const { return rows * (groups() * (sizeof(float) + sizeof(int32_t)) + stride()); }

  // Sets the memory in which `rows` rows are stored.
  void place(size_t rows, void* memory);

  // Quantises x (cols), and stores the result as row `row`. If `w_scales` (cols) is not null, each element of
  // x is first multiplied by the corresponding element of `w_scales`.
  void quantize(size_t row, const float* x, const float* w_scales) const;

  // Does the same as `quantize`, but rounds stochastically. The random bits depend on `seed`, on `random_row`
  // and on the column.
  void dither(size_t row, uint64_t seed, size_t random_row, const float* x, const float* w_scales) const;

  // The stored rows, beginning at row `row` and column `col`. A group of values with one scale must begin at
  // column `col`.
  kernels::CodedRows from(size_t row, size_t col) const;

 private:
  size_t stride() const;
  size_t groups() const { return ceil_div(cols_, group_); }

  size_t cols_ = 0, group_ = 1;
  int8_t* codes_ = nullptr;
  float* scales_ = nullptr;
  int32_t* corrections_ = nullptr;
};

// Writes the int8 codes of W[rows, cols], transposed for forward products, to out (cols / 4,
// kInt8PanelColumns). Each element of `out` holds four codes. There are at most kInt8PanelColumns rows, and
// the first column is a multiple of kInt8DepthUnit.
void transposed_quads(const WeightView& w, Range rows, Range cols, kernels::Int8Quad* out);

// Writes the int8 codes of W[rows, cols], for backward products, to out (rows / 4, kPanelColumns). If there
// are more than kPanelColumns columns, `out` holds two such panels, one after the other. The first row is a
// multiple of kInt8PanelColumns. The first column is a multiple of kPanelColumns, and there are at most
// kDecodedColumns columns. If `kept` is not null, it holds the codes of W. They are then copied from `kept`
// and transposed.
ColumnBlock<kernels::Int8Quad> column_quads(const WeightView& w, const KeptCodes* kept, Range rows,
                                            Range cols, kernels::Int8Quad* out);

}  // namespace nplora
