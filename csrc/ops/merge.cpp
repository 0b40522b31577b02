#include "ops/merge.h"

#include <algorithm>

#include "base/parallel.h"
#include "base/range.h"
#include "ops/scratch.h"

namespace nplora {

using kernels::kPanelColumns;
using kernels::Products;

namespace {

constexpr size_t kRowsPerTask = 32;
// Elements ahead, along its rows, that W is fetched.
constexpr size_t kPrefetch = 8 * kPanelColumns;
// Columns of a tile of 16-bit weights while it is in float: 8 x 384 floats = 12 KB.
constexpr size_t kTileColumns = 8 * kPanelColumns;

// Calls body(first, rows, scale * A[rows]) for blocks of rows. It is not interrupted: W would be left half
// merged.
template <class T, class Body>
void for_row_blocks(Matrix<const T> a, size_t d_in, double scale, const Body& body) {
  const double work = 2.0 * double(a.rows) * double(d_in) * double(a.cols);
  parallel_for(ceil_div(a.rows, kRowsPerTask), useful_threads(work), Interruptible::kNo, [&](size_t task) {
    const size_t first = task * kRowsPerTask, rows = std::min(kRowsPerTask, a.rows - first);
    T* scaled = scratch<T>(Scratch::kFactor, rows * a.cols);
    for (size_t i = 0; i < rows; ++i)
      for (size_t j = 0; j < a.cols; ++j) scaled[i * a.cols + j] = T(scale) * a.row(first + i)[j];
    body(first, rows, scaled);
  });
}

// c (rows, cols) += scaled (rows, r) b[:, first_col : first_col + cols].
template <class T>
void add_product(const Products<T>& k, size_t rows, const T* scaled, Matrix<const T> b, size_t first_col,
                 size_t cols, T* c, size_t c_stride) {
  for (size_t i = 0; i < rows; i += k.tile_tokens)
    for (size_t j = 0; j < cols; j += kPanelColumns) {
      for (size_t row = i; row < std::min(rows, i + k.tile_tokens); ++row)
        for (size_t line = 0; line < kPanelColumns; line += kCacheLine / sizeof(T))
          __builtin_prefetch(c + row * c_stride + j + kPrefetch + line, 1);
      k.outer_tile(std::min(k.tile_tokens, rows - i), std::min(kPanelColumns, cols - j), b.rows,
                   {scaled + i * b.rows, b.rows, 1}, b.data + first_col + j, b.stride, c + i * c_stride + j,
                   c_stride, true, {});
    }
}

}  // namespace

template <class T>
void merge_lora(Matrix<T> w, Matrix<const T> a, Matrix<const T> b, double scale) {
  if (scale == 0) return;
  const Products<T>& k = kernels::table().products<T>();
  for_row_blocks(a, w.cols, scale, [&](size_t first, size_t rows, const T* scaled) {
    add_product(k, rows, scaled, b, 0, w.cols, w.row(first), w.stride);
  });
}

template void merge_lora(Matrix<float>, Matrix<const float>, Matrix<const float>, double);
template void merge_lora(Matrix<double>, Matrix<const double>, Matrix<const double>, double);

void merge_lora(Matrix<uint16_t> w, Storage storage, Matrix<const float> a, Matrix<const float> b,
                double scale) {
  if (scale == 0) return;
  const Products<float>& k = kernels::table().f32;
  for_row_blocks(a, w.cols, scale, [&](size_t first, size_t rows, const float* scaled) {
    float* tile = scratch<float>(Scratch::kWeight, k.tile_tokens * kTileColumns);
    for (size_t i = 0; i < rows; i += k.tile_tokens)
      for (size_t c = 0; c < w.cols; c += kTileColumns) {
        const size_t height = std::min(k.tile_tokens, rows - i), width = std::min(kTileColumns, w.cols - c);
        for (size_t j = 0; j < height; ++j)
          widen(storage, width, w.row(first + i + j) + c, tile + j * kTileColumns);
        add_product(k, height, scaled + i * b.rows, b, c, width, tile, kTileColumns);
        for (size_t j = 0; j < height; ++j)
          narrow(storage, width, tile + j * kTileColumns, w.row(first + i + j) + c);
      }
  });
}

}  // namespace nplora
