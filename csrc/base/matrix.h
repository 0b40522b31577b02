// A non-owning row-major matrix: row i starts at data + i * stride.
#pragma once

#include <cstddef>

namespace nplora {

template <class T>
struct Matrix {
  T* data = nullptr;
  size_t rows = 0, cols = 0, stride = 0;

  T* row(size_t i) const { return data + i * stride; }
  operator Matrix<const T>() const { return {data, rows, cols, stride}; }
};

}  // namespace nplora
