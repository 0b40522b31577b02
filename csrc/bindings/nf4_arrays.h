// Checks the arrays of an NF4 weight from Python: their sizes must match n, the number of values.
#pragma once

#include "base/range.h"
#include "bindings/arrays.h"
#include "kernels/formats.h"
#include "kernels/kernel_table.h"

namespace nplora::bindings {

inline kernels::Nf4 nf4_of(size_t n, const Array<uint8_t>& codes, const Array<float>& absmax) {
  require_size("codes", codes, ceil_div(n, 2));
  require_size("absmax", absmax, ceil_div(n, BlockNf4::kElements));
  return {codes.data(), absmax.data()};
}

inline kernels::Nf4 nested_nf4_of(size_t n, const Array<uint8_t>& codes, const Array<uint8_t>& absmax_codes,
                                  const Array<float>& book, const Array<float>& scales, float offset) {
  const size_t blocks = ceil_div(n, BlockNf4::kElements);
  require_size("codes", codes, ceil_div(n, 2));
  require_size("absmax_codes", absmax_codes, blocks);
  require_size("book", book, kNf4Book);
  require_size("scales", scales, ceil_div(blocks, kNf4Group));
  return {codes.data(), nullptr, absmax_codes.data(), book.data(), scales.data(), offset};
}

}  // namespace nplora::bindings
