// Dropout of the input x of a low-rank update. The mask is never stored: whenever the mask is needed, it is
// computed again from its key.
#pragma once

#include <cmath>
#include <cstdint>

#include "base/matrix.h"
#include "kernels/kernel_table.h"

namespace nplora {

// The dropout probability, converted to the two arguments of the dropout kernels. An element is dropped if
// its random 32 bits are below `threshold`; all other elements are multiplied by `factor`.
struct Mask {
  uint32_t threshold;
  double factor;

  explicit Mask(double probability)
      : threshold(static_cast<uint32_t>(std::floor(probability * 4294967296.0))),
        factor(1 / (1 - probability)) {}
};

// Computes out (rows, cols) = drop(x). x is a block of a larger matrix, the batch, which has `width` columns.
// The block begins at row first_row and column first_col of the batch. Whether an element is dropped depends
// on its row and column in the batch.
template <class T>
void drop_rows(double probability, uint64_t key, size_t first_row, size_t first_col, size_t width,
               Matrix<const T> x, Matrix<T> out) {
  const Mask mask(probability);
  const auto& k = kernels::table().products<T>();
  for (size_t i = 0; i < x.rows; ++i)
    k.dropout(x.cols, key, (first_row + i) * width + first_col, mask.threshold, T(mask.factor), x.row(i),
              out.row(i));
}

}  // namespace nplora
