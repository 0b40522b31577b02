#include "ops/int8_weight.h"

#include <algorithm>

#include "base/parallel.h"

namespace nplora {

using kernels::Bf16;
using kernels::Int8Quad;
using kernels::kInt8PanelColumns;
using kernels::kPanelColumns;
using kernels::Panels;

namespace {

constexpr size_t kCodesPerQuad = kernels::kValuesPerElement<Int8Quad>;

// The number of rows of W that are decoded at a time. The decoded floats of 48 rows and two panels (96
// columns) take 18 KB.
constexpr size_t kRowsAtOnce = 48;

// Prefetches W[rows, cols] if W is packed. The hardware prefetches only memory that follows the rows in use,
// and the next panel is far away from these rows.
void fetch_panels(const WeightView& w, Range rows, Range cols) {
  if (!w.packed) return;
  for (size_t p = 0; p < cols.count; p += kPanelColumns) {
    const size_t bytes = rows.count * std::min(kPanelColumns, cols.count - p) * bytes_per_element(w.storage);
    const char* at = stored_at(w, rows.first, cols.first + p);
    for (size_t line = 0; line < bytes; line += kCacheLine) __builtin_prefetch(at + line);
  }
}

// Reads W[rows, cols] as elements of type E, and calls body(panel, column) for each panel. `column` is the
// first column of the panel, counted from cols.first. `panel` is a matrix with rows.count rows. Full panels
// are read two at a time. A narrower last panel is read by itself (see full_columns). If W cannot be read in
// place, the elements are decoded into `decoded` (rows.count * scratch_columns(kDecodedColumns) elements).
template <class E, class Body>
void for_panels_of(const WeightView& w, Range rows, Range cols, E* decoded, const Body& body) {
  const size_t end = cols.first + cols.count, full = full_columns(w.d_in);
  for (size_t first = cols.first, c; first < end; first += c) {
    c = std::min(kDecodedColumns, (first < full ? std::min(full, end) : end) - first);
    const Range some{first, c};
    fetch_panels(w, rows, {first + c, std::min(kDecodedColumns, end - first - c)});
    const Panels<E> panels = row_block(w, rows, some, false, decoded);
    for (size_t p = 0; p < some.count; p += kPanelColumns)
      body(Matrix<const E>{panels.data + p / kPanelColumns * panels.panel_stride, rows.count,
                           std::min(kPanelColumns, some.count - p), panels.row_stride},
           first - cols.first + p);
  }
}

// Calls for_panels_of for elements of type float, with scratch memory for the decoded elements.
template <class Body>
void for_float_panels(const WeightView& w, Range rows, Range cols, const Body& body) {
  float* decoded = scratch<float>(Scratch::kDecoded, rows.count * scratch_columns(kDecodedColumns));
  for_panels_of(w, rows, cols, decoded, body);
}

}  // namespace

// ---- the scales and the codes of W ----

void Int8Form::find_scales(const WeightView& w) {
  if (scales()) return;
  std::unique_ptr<float[]> found(new float[w.d_out]);
  const kernels::Int8Gemm& k = kernels::table().int8_gemm;
  const double elements = static_cast<double>(w.d_out) * static_cast<double>(w.d_in);
  parallel_for(ceil_div(w.d_out, kRowsAtOnce), useful_threads(4 * elements), Interruptible::kYes,
               [&](size_t task) {
                 const Range rows = nth_block(w.d_out, kRowsAtOnce, task);
                 float* largest = found.get() + rows.first;
                 std::fill_n(largest, rows.count, 0.0f);
                 for_float_panels(w, rows, {0, w.d_in}, [&](Matrix<const float> panel, size_t) {
                   k.largest(panel.rows, panel.cols, panel.data, panel.stride, largest);
                 });
                 for (size_t i = 0; i < rows.count; ++i) largest[i] = kernels::code_scale(largest[i]).scale;
               });
  float* none = nullptr;
  if (scales_.compare_exchange_strong(none, found.get())) found.release();
}

namespace {

size_t quads_of_block(const WeightView& w) {
  return ceil_div(w.d_in, kCodesPerQuad) * kInt8PanelColumns;
}

}  // namespace

KeptCodes::KeptCodes(const WeightView& w) : block_(quads_of_block(w)), codes_(bytes(w), Life::kLong) {
  const double elements = static_cast<double>(w.d_out) * static_cast<double>(w.d_in);
  parallel_for(ceil_div(w.d_out, kInt8PanelColumns), useful_threads(4 * elements), Interruptible::kYes,
               [&](size_t block) {
                 transposed_quads(w, nth_block(w.d_out, kInt8PanelColumns, block), {0, w.d_in},
                                  codes_.as<Int8Quad>() + block * block_);
               });
}

const Int8Quad* KeptCodes::at(size_t row, size_t col) const {
  return codes_.as<Int8Quad>() + row / kInt8PanelColumns * block_ + col / kCodesPerQuad * kInt8PanelColumns;
}

size_t KeptCodes::bytes(const WeightView& w) {
  return ceil_div(w.d_out, kInt8PanelColumns) * quads_of_block(w) * sizeof(Int8Quad);
}

void Int8Form::keep_codes(const WeightView& w) {
  if (codes()) return;
  find_scales(w);
  codes_.set(std::make_shared<const KeptCodes>(w));
}

// ---- rows of x or dy ----

static_assert(kInt8DepthUnit % kernels::kDithered == 0 && kernels::kInt8Group % kernels::kDithered == 0);

// The distance from one row to the next, in bytes. A multiple of 1 KB is avoided, because rows at this
// distance would evict each other from L1.
size_t CodedBlock::stride() const {
  const size_t bytes = round_up(cols_, kCodesPerQuad);
  return bytes % 1024 == 0 ? bytes + kCacheLine : bytes;
}

void CodedBlock::place(size_t rows, void* memory) {
  scales_ = static_cast<float*>(memory);
  corrections_ = reinterpret_cast<int32_t*>(scales_ + rows * groups());
  codes_ = reinterpret_cast<int8_t*>(corrections_ + rows * groups());
}

void CodedBlock::quantize(size_t row, const float* x, const float* w_scales) const {
  kernels::table().int8_gemm.quantize_groups(cols_, group_, x, w_scales, codes_ + row * stride(),
                                             scales_ + row * groups(), corrections_ + row * groups());
}

void CodedBlock::dither(size_t row, uint64_t seed, size_t random_row, const float* x,
                        const float* w_scales) const {
  kernels::table().int8_gemm.dither_groups(
      cols_, group_, seed, random_row * round_up(cols_, kernels::kDithered), x, w_scales,
      codes_ + row * stride(), scales_ + row * groups(), corrections_ + row * groups());
}

kernels::CodedRows CodedBlock::from(size_t row, size_t col) const {
  const size_t first = row * groups() + col / group_;
  return {codes_ + row * stride() + col, stride(), scales_ + first, corrections_ + first, group_, groups()};
}

// ---- blocks of W ----

namespace {

// For each of the rows `rows` of W, of[i] is the inverse of the scale: 1 / scale, or 0 if the scale is 0 or
// NaN.
struct Inverses {
  float of[kRowsAtOnce];

  Inverses(const WeightView& w, Range rows) {
    const float* scales = w.int8->scales() + rows.first;
    for (size_t i = 0; i < rows.count; ++i) of[i] = scales[i] > 0 ? 1 / scales[i] : 0;
  }
};
static_assert(kInt8PanelColumns <= kRowsAtOnce);

// Converts each panel of W[rows, cols] to int8 codes, and calls body(panel, column). `panel` is the matrix of
// the codes, and `column` is the first column of the panel, counted from cols.first. `codes` is memory for
// one panel: rows.count * kPanelColumns codes. If the width of a panel is not a multiple of four, each row of
// codes is padded with zeros. encodes_blocks(w) must be false.
template <class Body>
void for_coded_panels(const WeightView& w, Range rows, Range cols, const Inverses& inverses, uint8_t* codes,
                      const Body& body) {
  const kernels::Int8Gemm& k = kernels::table().int8_gemm;
  const auto encode_with = [&](auto encode) {
    return [&body, &inverses, codes, encode](auto panel, size_t column) {
      if (panel.cols % kCodesPerQuad != 0) std::fill_n(codes, panel.rows * kPanelColumns, uint8_t{0});
      encode(panel.rows, panel.cols, panel.data, panel.stride, inverses.of, codes, kPanelColumns);
      body(Matrix<const uint8_t>{codes, panel.rows, panel.cols, kPanelColumns}, column);
    };
  };
  if (in_place<Bf16>(w))
    for_panels_of<Bf16>(w, rows, cols, nullptr, encode_with(k.encode_bf16));
  else
    for_float_panels(w, rows, cols, encode_with(k.encode));
}

}  // namespace

void transposed_quads(const WeightView& w, Range rows, Range cols, Int8Quad* out) {
  const kernels::KernelTable& k = kernels::table();
  const Inverses inverses(w, rows);
  constexpr size_t kColumns = kInt8DepthUnit;
  alignas(kCacheLine) uint8_t codes[kInt8PanelColumns * scratch_columns(kColumns)];
  const auto transpose = [&](Matrix<const uint8_t> block, size_t col) {
    // `to_lanes` moves floats without changing their bits, so here it moves four codes at a time.
    k.f32.to_lanes(kInt8PanelColumns, rows.count, ceil_div(block.cols, kCodesPerQuad),
                   reinterpret_cast<const float*>(block.data), block.stride / kCodesPerQuad,
                   reinterpret_cast<float*>(out + col / kCodesPerQuad * kInt8PanelColumns));
  };
  if (encodes_blocks(w)) {
    for (size_t c = 0; c < cols.count; c += kColumns) {
      const Range some{cols.first + c, std::min(kColumns, cols.count - c)};
      transpose(encoded_block(w, rows, some, inverses.of, codes), c);
    }
    return;
  }
  for_coded_panels(w, rows, cols, inverses, codes, transpose);
}

namespace {

// Prefetches the codes of W[row:row + kInt8PanelColumns, cols].
void fetch_kept(const KeptCodes& kept, size_t row, Range cols) {
  const auto* at = reinterpret_cast<const char*>(kept.at(row, cols.first));
  const size_t bytes = ceil_div(cols.count, kCodesPerQuad) * kInt8PanelColumns * sizeof(Int8Quad);
  for (size_t line = 0; line < bytes; line += kCacheLine) __builtin_prefetch(at + line);
}

// Does the work of column_quads if `kept` holds the codes of W. The hardware does not prefetch the codes of
// the next rows, because these codes are in another block of `kept`, far away in memory.
void turn_kept(const KeptCodes& kept, Range rows, Range cols, Int8Quad* out, size_t panel_stride) {
  constexpr size_t kAhead = 4 * kInt8PanelColumns;
  for (size_t i = 0; i < rows.count; i += kInt8PanelColumns) {
    if (i + kAhead < rows.count) fetch_kept(kept, rows.first + i + kAhead, cols);
    for (size_t c = 0; c < cols.count; c += kPanelColumns)
      kernels::table().int8_gemm.turn_quads(
          std::min(kInt8PanelColumns, rows.count - i),
          ceil_div(std::min(kPanelColumns, cols.count - c), kCodesPerQuad),
          kept.at(rows.first + i, cols.first + c), kInt8PanelColumns,
          out + c / kPanelColumns * panel_stride + i / kCodesPerQuad * kPanelColumns, kPanelColumns);
  }
}

}  // namespace

ColumnBlock<Int8Quad> column_quads(const WeightView& w, const KeptCodes* kept, Range rows, Range cols,
                                   Int8Quad* out) {
  const kernels::Int8Gemm& k = kernels::table().int8_gemm;
  const size_t panel_stride = ceil_div(rows.count, kCodesPerQuad) * kPanelColumns;
  if (kept) {
    turn_kept(*kept, rows, cols, out, panel_stride);
    return {out, kPanelColumns, panel_stride};
  }
  uint8_t codes[kRowsAtOnce * scratch_columns(kDecodedColumns)];
  for (size_t i = 0; i < rows.count; i += kRowsAtOnce) {
    const Range some{rows.first + i, std::min(kRowsAtOnce, rows.count - i)};
    const Inverses inverses(w, some);
    const auto interleave = [&](Matrix<const uint8_t> panel, size_t col) {
      k.quad_rows(panel.rows, panel.cols, panel.data, panel.stride,
                  out + col / kPanelColumns * panel_stride + i / kCodesPerQuad * kPanelColumns,
                  kPanelColumns);
    };
    if (encodes_blocks(w)) {
      const Matrix<const uint8_t> block = encoded_block(w, some, cols, inverses.of, codes);
      for (size_t c = 0; c < cols.count; c += kPanelColumns)
        interleave({block.data + c, some.count, std::min(kPanelColumns, cols.count - c), block.stride}, c);
    } else {
      for_coded_panels(w, some, cols, inverses, codes, interleave);
    }
  }
  return {out, kPanelColumns, panel_stride};
}

}  // namespace nplora
