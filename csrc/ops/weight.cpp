#include "ops/weight.h"

#include <algorithm>
#include <cassert>
#include <cstring>
#include <type_traits>

#include "base/parallel.h"
#include "ops/blocks.h"
#include "ops/int8_weight.h"
#include "ops/scratch.h"

namespace nplora {

using kernels::Bf16;
using kernels::Bf16Pair;
using kernels::DecodedRows;
using kernels::kPanelColumns;
using kernels::Panels;

namespace {

constexpr size_t kRowsPerTask = 64;

// The offset, in bytes, of element (row, col) in packed W. `col` is a multiple of kPanelColumns.
size_t packed_offset(const WeightView& w, size_t row, size_t col) {
  const size_t width = std::min(kPanelColumns, w.d_in - col);
  return (col * w.d_out + row * width) * bytes_per_element(w.storage);
}

// The address of element (row, col) of W, and the number of elements from the start of this row to the start
// of the next row, within the same panel. `col` is a multiple of kPanelColumns.
struct Location {
  const char* at;
  size_t row_stride;
};

Location locate(const WeightView& w, size_t row, size_t col) {
  const auto* data = static_cast<const char*>(w.data);
  if (w.packed) return {data + packed_offset(w, row, col), std::min(kPanelColumns, w.d_in - col)};
  return {data + (row * w.row_stride + col) * bytes_per_element(w.storage), w.row_stride};
}

// Calls body(first, count) for each panel of a row, where `first` is the first column of the panel, and
// `count` is the number of columns.
template <class Body>
void for_panels(size_t d_in, const Body& body) {
  for (size_t c = 0; c < d_in; c += kPanelColumns) body(c, std::min(kPanelColumns, d_in - c));
}

// Calls body(row) for each row of a matrix. If the matrix has no columns, `body` is not called.
template <class Body>
void for_rows(size_t rows, size_t cols, const Body& body) {
  if (cols == 0) return;
  const double elements = static_cast<double>(rows) * static_cast<double>(cols);
  parallel_for(ceil_div(rows, kRowsPerTask), useful_threads(elements), Interruptible::kYes, [&](size_t task) {
    const Range block = nth_block(rows, kRowsPerTask, task);
    for (size_t i = 0; i < block.count; ++i) body(block.first + i);
  });
}

// Decodes W[rows, cols] from low-bit blocks to out (rows, cols). Except in NF4, the range `cols` must consist
// of whole sub-blocks.
void decode(const WeightView& w, Range rows, Range cols, const DecodedRows& out) {
  const kernels::BlockDecoders& blocks = kernels::table().blocks;
  if (w.storage == Storage::kNf4)
    return blocks.decode_nf4(rows.count, cols.count, w.nf4, rows.first * w.d_in + cols.first, w.d_in, out);
  blocks.decode[static_cast<size_t>(format_of(w.storage))](
      rows.count, cols.first, cols.count, static_cast<const char*>(w.data) + rows.first * w.row_stride,
      w.row_stride, out);
}

// A range of columns of W, extended to whole sub-blocks for the decoder. `before` is the number of columns
// that were added before the range.
struct WholeSubBlocks {
  Range cols;
  size_t before;
};
WholeSubBlocks sub_blocks_of(const WeightView& w, Range cols) {
  if (w.storage == Storage::kNf4) return {cols, 0};
  const size_t before = cols.first % kSubBlock;
  return {{cols.first - before, round_up(before + cols.count, kSubBlock)}, before};
}

// The distance from one decoded row to the next. Multiples of 1 KB are avoided, because rows at these
// distances would evict each other from L1.
size_t decoded_stride(size_t cols, size_t element_bytes) {
  return cols * element_bytes % 1024 == 0 ? cols + kPanelColumns / 3 : cols;
}

// Cuts `rows` into ranges of a few rows, and calls body(first, few, values) for each range `few`. `first` is
// the first row of the range, counted from rows.first. few.count is even, except possibly in the last call.
// `values` is memory for few.count * cols floats, which fit into L1.
template <class Body>
void for_few_rows(Range rows, size_t cols, const Body& body) {
  constexpr size_t kValues = 4608;  // 18 KB of floats
  const size_t most = std::max<size_t>(2, kValues / std::max<size_t>(1, cols) / 2 * 2);
  float* values = scratch<float>(Scratch::kFewRows, most * cols);
  for (size_t i = 0; i < rows.count; i += most)
    body(i, Range{rows.first + i, std::min(most, rows.count - i)}, values);
}

template <class T>
void copy_row(const WeightView& w, size_t row, T* out) {
  if constexpr (std::is_same_v<T, float>)
    if (is_blocks(w.storage)) return decode(w, {row, 1}, {0, w.d_in}, {out, 0});
  for_panels(w.d_in, [&](size_t c, size_t width) { widen(w.storage, width, locate(w, row, c).at, out + c); });
}

// Prefetches W[rows, cols], unless W is packed or in NF4. The hardware prefetches a stream of reads only
// after several reads. Here, there are too few rows for this, or a new stream begins.
void fetch(const WeightView& w, Range rows, Range cols) {
  if (w.packed || w.storage == Storage::kNf4) return;
  const bool blocks = is_blocks(w.storage);
  const size_t elements = blocks ? info(format_of(w.storage)).elements : 1;
  const size_t bytes = blocks ? info(format_of(w.storage)).bytes : bytes_per_element(w.storage);
  const size_t pitch = blocks ? w.row_stride : w.row_stride * bytes;
  const size_t first = cols.first / elements * bytes, count = ceil_div(cols.count, elements) * bytes;
  const char* row = static_cast<const char*>(w.data) + rows.first * pitch + first;
  for (size_t i = 0; i < rows.count; ++i, row += pitch)
    for (size_t line = 0; line < count; line += kCacheLine) __builtin_prefetch(row + line);
}

// Prefetches the columns that follow `cols` in the rows `rows`: cols.count columns, or fewer at the end of
// the rows.
void fetch_after(const WeightView& w, Range rows, Range cols) {
  const size_t end = cols.first + cols.count;
  fetch(w, rows, {end, std::min(cols.count, w.d_in - end)});
}

// While row i of a block is in use, prefetches row i + 2. A row of a block has at most 8 KB, so three rows
// fit into L1.
void fetch_next(const WeightView& w, Range rows, size_t i, Range cols) {
  if (i + 2 < rows.count) fetch(w, {rows.first + i + 2, 1}, cols);
}

// Writes the panels of a block to `out`, one after the other, widened to T. Each panel has contiguous rows of
// kPanelColumns columns; the last panel may be narrower. A W that is not packed is read row by row.
template <class T>
void widen_block(const WeightView& w, Range rows, Range cols, T* out) {
  if (w.packed)
    return for_panels(cols.count, [&](size_t c, size_t width) {
      widen(w.storage, rows.count * width, stored_at(w, rows.first, cols.first + c), out + rows.count * c);
    });
  for (size_t i = 0; i < rows.count; ++i) {
    fetch_next(w, rows, i, cols);
    for_panels(cols.count, [&](size_t c, size_t width) {
      widen(w.storage, width, stored_at(w, rows.first + i, cols.first + c), out + rows.count * c + i * width);
    });
  }
}

}  // namespace

const char* stored_at(const WeightView& w, size_t row, size_t col) {
  return locate(w, row, col).at;
}

template <>
bool in_place<float>(const WeightView& w) {
  return w.storage == Storage::kFloat32;
}
template <>
bool in_place<double>(const WeightView& w) {
  return w.storage == Storage::kFloat64;
}
template <>
bool in_place<Bf16>(const WeightView& w) {
  return w.storage == Storage::kBfloat16;
}
template <>
bool in_place<Bf16Pair>(const WeightView& w) {
  return w.storage == Storage::kBfloat16 && w.packed;
}

namespace {

template <class E>
Panels<E> stored_rows(const WeightView& w, Range rows, Range cols) {
  const Location first = locate(w, rows.first, cols.first);
  const size_t panel_stride = w.packed ? w.d_out * kPanelColumns : kPanelColumns;
  return {reinterpret_cast<const E*>(first.at), first.row_stride, panel_stride};
}

template <class E>
ColumnBlock<E> stored_columns(const WeightView& w, Range rows, Range cols) {
  const Panels<E> panels = stored_rows<E>(w, rows, cols);
  return {panels.data, panels.row_stride};
}

template <class E>
bool stays(const WeightView& w, bool shared) {
  return in_place<E>(w) && (w.packed || !shared);
}

}  // namespace

template <class T>
Panels<T> row_block(const WeightView& w, Range rows, Range cols, bool shared, T* scratch) {
  if (stays<T>(w, shared)) return stored_rows<T>(w, rows, cols);
  if constexpr (std::is_same_v<T, float>)
    if (is_blocks(w.storage)) {
      const WholeSubBlocks sub_blocks = sub_blocks_of(w, cols);
      fetch_after(w, rows, sub_blocks.cols);
      const size_t stride = decoded_stride(sub_blocks.cols.count, sizeof(T));
      decode(w, rows, sub_blocks.cols, {scratch, stride});
      return {scratch + sub_blocks.before, stride, kPanelColumns};
    }
  widen_block(w, rows, cols, scratch);
  return {scratch, std::min(kPanelColumns, cols.count), rows.count * kPanelColumns};
}

template <>
Panels<Bf16> row_block(const WeightView& w, Range rows, Range cols, bool, Bf16*) {
  return stored_rows<Bf16>(w, rows, cols);
}

// If W is packed in bfloat16, a block of full panels is read in place as panels of pairs. Any other block is
// copied. A block with a narrower last panel is copied, because the rows of this panel may have an odd number
// of values: in the copy, the last value of such a row is paired with zero.
template <>
Panels<Bf16Pair> row_block(const WeightView& w, Range rows, Range cols, bool, Bf16Pair* scratch) {
  constexpr size_t kPanelPairs = kPanelColumns / 2;
  if (in_place<Bf16Pair>(w) && cols.count % kPanelColumns == 0) {
    const auto* first = reinterpret_cast<const Bf16Pair*>(locate(w, rows.first, cols.first).at);
    return {first, kPanelPairs, w.d_out * kPanelPairs};
  }
  const kernels::Conversions& convert = kernels::table().convert;
  if (is_blocks(w.storage)) {
    const WholeSubBlocks sub_blocks = sub_blocks_of(w, cols);
    fetch_after(w, rows, sub_blocks.cols);
    const size_t pairs = ceil_div(sub_blocks.cols.count, 2);
    for_few_rows(rows, 2 * pairs, [&](size_t i, Range few, float* values) {
      if (sub_blocks.cols.count % 2 != 0) std::fill_n(values, 2 * few.count * pairs, 0.0f);
      decode(w, few, sub_blocks.cols, {values, 2 * pairs});
      convert.narrow_bfloat16(2 * few.count * pairs, values,
                              reinterpret_cast<uint16_t*>(scratch + i * pairs));
    });
    return {scratch + sub_blocks.before / 2, pairs, kPanelPairs};
  }
  const size_t row_stride = ceil_div(std::min(kPanelColumns, cols.count), 2);
  for (size_t i = 0; i < rows.count; ++i) {
    fetch_next(w, rows, i, cols);
    for_panels(cols.count, [&](size_t c, size_t width) {
      const char* from = stored_at(w, rows.first + i, cols.first + c);
      const size_t pairs = ceil_div(width, 2);
      Bf16Pair* out = scratch + rows.count * c / 2 + i * row_stride;
      if (w.storage == Storage::kBfloat16) {
        out[pairs - 1] = Bf16Pair(0);
        std::memcpy(out, from, width * bytes_per_element(w.storage));
        return;
      }
      float values[kPanelColumns + 1];
      widen(w.storage, width, from, values);
      values[width] = 0;
      convert.narrow_bfloat16(2 * pairs, values, reinterpret_cast<uint16_t*>(out));
    });
  }
  return {scratch, row_stride, rows.count * kPanelPairs};
}

namespace {

// How column_block stores its columns in scratch memory: as two full panels, one after the other, or as a
// single panel that contains all columns.
struct Panelling {
  size_t panels, width;

  Panelling(const WeightView& w, Range cols) {
    const bool in_runs = w.storage != Storage::kNf4 || w.d_in % 16 == 0;  // see decode_nf4
    panels = in_runs && cols.count == kDecodedColumns ? 2 : 1;
    width = cols.count / panels;
  }
  size_t panel_stride(size_t rows) const { return panels == 2 ? rows * width : kPanelColumns; }
  Range panel(Range cols, size_t i) const { return {cols.first + i * width, width}; }
};

// Cuts `rows` into ranges of a few rows, and calls body(first, few) for each range `few`. `first` is the
// first row of the range, counted from rows.first. few.count is even, except possibly in the last call.
// Before each call, the columns `cols` of the next range are prefetched.
template <class Body>
void for_fetched_rows(const WeightView& w, Range rows, Range cols, const Body& body) {
  constexpr size_t kRows = 16;  // the floats of 16 rows (6 KB) stay in L1 together with the prefetched rows
  for (size_t i = 0; i < rows.count; i += kRows) {
    const size_t end = std::min(i + kRows, rows.count);
    fetch(w, {rows.first + end, std::min(kRows, rows.count - end)}, cols);
    body(i, Range{rows.first + i, end - i});
  }
}

// Widens the block W[rows, cols] to out (rows, cols). In each row, the elements of these columns must be
// contiguous in memory. So in packed W, all columns must belong to one panel.
template <class T>
void widen_rows(const WeightView& w, Range rows, Range cols, T* out) {
  const Location from = locate(w, rows.first, cols.first);
  const size_t pitch = from.row_stride * bytes_per_element(w.storage);
  for (size_t i = 0; i < rows.count; ++i)
    widen(w.storage, cols.count, from.at + i * pitch, out + i * cols.count);
}

// Converts the block W[rows, cols] to pairs of neighbouring rows: out (ceil(rows / 2), cols). In each row,
// the elements of these columns must be contiguous in memory.
void pair(const WeightView& w, Range rows, Range cols, Bf16Pair* out) {
  const kernels::Conversions& convert = kernels::table().convert;
  const Location from = locate(w, rows.first, cols.first);
  if (w.storage == Storage::kBfloat16)
    return convert.pair_bits(rows.count, cols.count, reinterpret_cast<const uint16_t*>(from.at),
                             from.row_stride, out);
  if (w.storage == Storage::kFloat32)
    return convert.pair_rows(rows.count, cols.count, reinterpret_cast<const float*>(from.at), from.row_stride,
                             out);
  for_few_rows(rows, cols.count, [&](size_t i, Range few, float* values) {
    widen_rows(w, few, cols, values);
    convert.pair_rows(few.count, cols.count, values, cols.count, out + i / 2 * cols.count);
  });
}

}  // namespace

template <class T>
ColumnBlock<T> column_block(const WeightView& w, Range rows, Range cols, bool shared, T* scratch) {
  if (stays<T>(w, shared)) return stored_columns<T>(w, rows, cols);
  const Panelling to(w, cols);
  const size_t panel_stride = to.panel_stride(rows.count);
  if (is_blocks(w.storage)) {
    if constexpr (std::is_same_v<T, float>)
      decode(w, rows, cols, {scratch, to.width, to.panels == 2 ? panel_stride - to.width : 0});
  } else if (w.packed) {
    widen_block(w, rows, cols, scratch);
  } else {
    for_fetched_rows(w, rows, cols, [&](size_t i, Range few) {
      for (size_t p = 0; p < to.panels; ++p)
        widen_rows(w, few, to.panel(cols, p), scratch + p * panel_stride + i * to.width);
    });
  }
  return {scratch, to.width, panel_stride};
}

template <>
ColumnBlock<Bf16Pair> column_block(const WeightView& w, Range rows, Range cols, bool, Bf16Pair* scratch) {
  const Panelling to(w, cols);
  const size_t panel_stride = to.panel_stride(ceil_div(rows.count, 2));
  if (is_blocks(w.storage)) {
    for_few_rows(rows, cols.count, [&](size_t i, Range few, float* values) {
      decode(w, few, cols, {values, cols.count});
      for (size_t p = 0; p < to.panels; ++p)
        kernels::table().convert.pair_rows(few.count, to.width, values + p * to.width, cols.count,
                                           scratch + p * panel_stride + i / 2 * to.width);
    });
  } else {
    for_fetched_rows(w, rows, cols, [&](size_t i, Range few) {
      for (size_t p = 0; p < to.panels; ++p)
        pair(w, few, to.panel(cols, p), scratch + p * panel_stride + i / 2 * to.width);
    });
  }
  return {scratch, to.width, panel_stride};
}

template <>
ColumnBlock<Bf16> column_block(const WeightView& w, Range rows, Range cols, bool, Bf16*) {
  return stored_columns<Bf16>(w, rows, cols);
}

template Panels<float> row_block(const WeightView&, Range, Range, bool, float*);
template Panels<double> row_block(const WeightView&, Range, Range, bool, double*);
template ColumnBlock<float> column_block(const WeightView&, Range, Range, bool, float*);
template ColumnBlock<double> column_block(const WeightView&, Range, Range, bool, double*);

Matrix<const uint8_t> encoded_block(const WeightView& w, Range rows, Range cols, const float* inverses,
                                    uint8_t* scratch) {
  const WholeSubBlocks sub_blocks = sub_blocks_of(w, cols);
  const size_t stride = sub_blocks.cols.count;
  kernels::table().blocks.encode[static_cast<size_t>(format_of(w.storage))](
      rows.count, sub_blocks.cols.first, sub_blocks.cols.count,
      static_cast<const char*>(w.data) + rows.first * w.row_stride, w.row_stride, inverses,
      static_cast<uint8_t>(kernels::table().int8_gemm.code_offset), scratch, stride);
  return {scratch + sub_blocks.before, rows.count, cols.count, stride};
}

bool dots_blocks(const WeightView& w) {
  return is_blocks(w.storage) && (w.storage != Storage::kNf4 || w.d_in % BlockNf4::kElements == 0);
}

void dots_of_blocks(const WeightView& w, Range rows, Matrix<const float> x, float* part,
                    const kernels::Fetch& next) {
  const kernels::BlockDots& k = kernels::table().block_dots;
  if (w.storage == Storage::kNf4)
    return k.dots_nf4(x.rows, rows.count, w.d_in, w.nf4, rows.first * w.d_in, w.d_in, x.data, x.stride, part,
                      next);
  k.dots[static_cast<size_t>(format_of(w.storage))](
      x.rows, rows.count, w.d_in, static_cast<const char*>(w.data) + rows.first * w.row_stride, w.row_stride,
      x.data, x.stride, part, next);
}

void int8_dots_of_blocks(const WeightView& w, Range rows, size_t m, const kernels::Int8Rows& x, float* y,
                         const kernels::Fetch& next) {
  kernels::table().int8.dots[static_cast<size_t>(format_of(w.storage))](
      m, rows.count, w.d_in, static_cast<const char*>(w.data) + rows.first * w.row_stride, w.row_stride, x, y,
      next);
}

PackedWeight::PackedWeight(const WeightView& w, std::shared_ptr<const void> owner)
    : owner_(std::move(owner)), view_(w) {
  if (view_.compute == Compute::kInt8) int8_ = std::make_unique<Int8Form>();
  view_.int8 = int8_.get();
}

PackedWeight::~PackedWeight() = default;

template <class T>
PackedWeight::PackedWeight(Matrix<const T> w, Storage storage, Compute compute)
    : buffer_(w.rows * w.cols * bytes_per_element(storage), Life::kLong),
      view_{storage, true, buffer_.as<void>(), w.rows, w.cols, 0, compute},
      int8_(compute == Compute::kInt8 ? std::make_unique<Int8Form>() : nullptr) {
  view_.int8 = int8_.get();
  for_rows(w.rows, w.cols, [&](size_t i) {
    for_panels(w.cols, [&](size_t c, size_t width) {
      narrow(storage, width, w.row(i) + c, buffer_.as<char>() + packed_offset(view_, i, c));
    });
  });
}

template PackedWeight::PackedWeight(Matrix<const float>, Storage, Compute);
template PackedWeight::PackedWeight(Matrix<const double>, Storage, Compute);
template PackedWeight::PackedWeight(Matrix<const uint16_t>, Storage, Compute);

size_t PackedWeight::nbytes() const {
  if (view_.storage == Storage::kNf4) {
    const size_t n = view_.d_out * view_.d_in, blocks = ceil_div(n, BlockNf4::kElements);
    const size_t absmax = view_.nf4.absmax
                              ? blocks * sizeof(float)
                              : blocks + (ceil_div(blocks, kNf4Group) + kNf4Book) * sizeof(float);
    return ceil_div(n, 2) + absmax;
  }
  if (is_blocks(view_.storage)) return view_.d_out * view_.row_stride;
  return view_.d_out * view_.d_in * bytes_per_element(view_.storage);
}

void PackedWeight::keep_int8() const {
  assert(compute() == Compute::kInt8);
  int8_->keep_codes(view_);
}

void PackedWeight::drop_int8() const {
  if (int8_) int8_->drop_codes();
}

bool PackedWeight::keeps_int8() const {
  return int8_ && int8_->codes();
}

size_t PackedWeight::int8_nbytes() const {
  return KeptCodes::bytes(view_);
}

template <class T>
void PackedWeight::unpack(Matrix<T> out) const {
  for_rows(view_.d_out, view_.d_in, [&](size_t i) { copy_row(view_, i, out.row(i)); });
}

template <class T>
void PackedWeight::gather_rows(const int64_t* ids, Matrix<T> out) const {
  for_rows(out.rows, view_.d_in, [&](size_t i) { copy_row(view_, static_cast<size_t>(ids[i]), out.row(i)); });
}

void PackedWeight::row_sums_of_squares(double* out) const {
  std::fill_n(out, view_.d_out, 0.0);
  const auto sum = [&]<class T>(size_t i, T* row) {
    copy_row(view_, i, row);
    out[i] = kernels::table().products<T>().sum_of_squares(view_.d_in, row);
  };
  for_rows(view_.d_out, view_.d_in, [&](size_t i) {
    if (view_.storage == Storage::kFloat64)
      sum(i, scratch<double>(Scratch::kWeight, view_.d_in));
    else
      sum(i, scratch<float>(Scratch::kWeight, view_.d_in));
  });
}

template void PackedWeight::unpack(Matrix<float>) const;
template void PackedWeight::unpack(Matrix<double>) const;
template void PackedWeight::unpack(Matrix<uint16_t>) const;
template void PackedWeight::gather_rows(const int64_t*, Matrix<float>) const;
template void PackedWeight::gather_rows(const int64_t*, Matrix<double>) const;

}  // namespace nplora
