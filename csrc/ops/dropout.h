// Dropout on the low-rank path. The mask is never stored: it is drawn again from its key.
#pragma once

#include <cmath>
#include <cstdint>

#include "base/matrix.h"
#include "kernels/kernel_table.h"

namespace nplora {

// The mask in the form that the kernels take.
struct Mask {
  uint32_t threshold;
  double factor;

  explicit Mask(double probability)
      : threshold(static_cast<uint32_t>(std::floor(probability * 4294967296.0))),
        factor(1 / (1 - probability)) {}
};

// out (rows, cols) = drop(x). x begins at (first_row, first_col) of a batch with `width` columns. Elements
// are numbered by their place in the batch.
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
