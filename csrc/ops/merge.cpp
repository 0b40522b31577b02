#include "ops/merge.h"

#include <algorithm>

#include "base/parallel.h"
#include "base/range.h"
#include "ops/merge_on_the_fly.h"
#include "ops/scratch.h"

namespace nplora {

using kernels::kPanelColumns;
using kernels::Products;

namespace {

constexpr size_t kRowsPerTask = 48;  // a multiple of tile_tokens (for float) on every instruction set
// A task multiplies its rows of A by a few columns of B at a time: the panels of these columns of B take at
// most kColumnsBytes bytes. On a Zen 4, whose L2 holds 1 MB, merging was 2-3 % slower with a limit of 128 KB
// than with this limit.
constexpr size_t kColumnsBytes = size_t{320} << 10;
// The number of columns of a tile. A 16-bit weight is converted to float one tile at a time. A tile of 8 rows
// takes 8 x 384 floats = 12 KB.
constexpr size_t kTileColumns = 8 * kPanelColumns;

// Copies B to dense panels of kPanelColumns columns. In the caller's B, the distance between two rows may be
// a multiple of 4 KB, and rows at this distance would evict each other from L1.
template <class T>
const T* panels_of(Matrix<const T> b) {
  T* panels = scratch<T>(Scratch::kLowLanes, b.rows * b.cols);
  T* to = panels;
  for (size_t c = 0; c < b.cols; c += kPanelColumns)
    for (size_t i = 0, width = std::min(kPanelColumns, b.cols - c); i < b.rows; ++i, to += width)
      std::copy_n(b.row(i) + c, width, to);
  return panels;
}

// Calls body(first, rows, scaled) for each block of rows of A: `first` is the first row, `rows` is the number
// of rows, and `scaled` holds scale * A for these rows. The loop cannot be interrupted, because an interrupt
// would leave W partly merged.
template <class T, class Body>
void for_row_blocks(Matrix<const T> a, size_t d_in, double scale, const Body& body) {
  const double work = 2.0 * double(a.rows) * double(d_in) * double(a.cols);
  parallel_for(ceil_div(a.rows, kRowsPerTask), useful_threads(work), Interruptible::kNo, [&](size_t task) {
    const size_t first = task * kRowsPerTask, rows = std::min(kRowsPerTask, a.rows - first);
    body(first, rows, scaled_rows(a, {first, rows}, scale, scratch<T>(Scratch::kFactor, rows * a.cols)));
  });
}

}  // namespace

template <class T>
void merge_lora(Matrix<T> w, Matrix<const T> a, Matrix<const T> b, double scale) {
  if (scale == 0 || b.rows == 0) return;
  const Products<T>& k = kernels::table().products<T>();
  const T* panels = panels_of(b);
  const size_t most = std::max(size_t{1}, kColumnsBytes / sizeof(T) / b.rows / kPanelColumns) * kPanelColumns;
  for_row_blocks(a, w.cols, scale, [&](size_t first, size_t rows, const T* scaled) {
    for (size_t c = 0; c < w.cols; c += most)
      k.merge(rows, std::min(most, w.cols - c), b.rows, scaled, panels + c * b.rows, w.row(first) + c,
              w.stride, /*streams=*/true);
  });
}

template void merge_lora(Matrix<float>, Matrix<const float>, Matrix<const float>, double);
template void merge_lora(Matrix<double>, Matrix<const double>, Matrix<const double>, double);

void merge_lora(Matrix<uint16_t> w, Storage storage, Matrix<const float> a, Matrix<const float> b,
                double scale, std::optional<uint64_t> key) {
  if (scale == 0 || b.rows == 0) return;
  const Products<float>& k = kernels::table().f32;
  const kernels::Conversions& convert = kernels::table().convert;
  const auto dither = storage == Storage::kBfloat16 ? convert.dither_bfloat16 : convert.dither_float16;
  const float* panels = panels_of(b);
  for_row_blocks(a, w.cols, scale, [&](size_t first, size_t rows, const float* scaled) {
    float* tile = scratch<float>(Scratch::kWeight, k.tile_tokens * kTileColumns);
    for (size_t i = 0; i < rows; i += k.tile_tokens)
      for (size_t c = 0; c < w.cols; c += kTileColumns) {
        const size_t height = std::min(k.tile_tokens, rows - i), width = std::min(kTileColumns, w.cols - c);
        for (size_t j = 0; j < height; ++j)
          widen(storage, width, w.row(first + i + j) + c, tile + j * kTileColumns);
        k.merge(height, width, b.rows, scaled + i * b.rows, panels + c * b.rows, tile, kTileColumns,
                /*streams=*/false);
        for (size_t j = 0; j < height; ++j) {
          float* row = tile + j * kTileColumns;
          if (key) dither(width, *key, uint64_t{first + i + j} * w.cols + c, row);
          narrow(storage, width, row, w.row(first + i + j) + c);
        }
      }
  });
}

}  // namespace nplora
