#include "ops/blocks.h"

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "base/parallel.h"
#include "base/range.h"
#include "ops/half.h"
#include "ops/quantizers/quantize.h"

namespace nplora {

namespace {

constexpr size_t kElementsPerTask = 16384;

// The cost of four operations, in floating-point operations for each element: quantising with a search for
// the best scales, quantising to NF4, decoding, and checking.
constexpr double kSearchOperations = 100, kNf4Operations = 20, kDecodeOperations = 2, kCheckOperations = 1;

// Cuts n items into groups, and calls body(items) for the range of items in each group. Each item has
// `size` > 0 elements.
template <class Body>
void for_pieces(size_t n, size_t size, double operations_per_element, const Body& body) {
  const size_t items = std::max<size_t>(1, kElementsPerTask / size);
  parallel_for(ceil_div(n, items), useful_threads(operations_per_element * double(n) * double(size)),
               Interruptible::kYes, [&](size_t task) { body(nth_block(n, items, task)); });
}

// ---- checks of values ----

// The bits of |x| as an integer. The integers have the same order as the numbers |x|. The integers of
// infinity and NaN are larger than the integers of all finite numbers.
uint32_t magnitude(float x) {
  return std::bit_cast<uint32_t>(x) & 0x7FFFFFFFu;
}

bool within(size_t n, const float* x, uint32_t limit) {
  uint32_t most = 0;
  for (size_t i = 0; i < n; ++i) most = std::max(most, magnitude(x[i]));
  return most <= limit;
}

// The shortest digits that round to x. The tables of std::to_chars would make a wheel 70 KB larger if it
// contains the C++ library.
std::string text(float x) {
  char digits[32];
  for (int precision = 6; precision <= 9; ++precision) {
    std::snprintf(digits, sizeof digits, "%.*g", precision, double{x});
    if (std::strtof(digits, nullptr) == x) break;
  }
  return digits;
}

}  // namespace

void require_storable(BlockFormat format, Matrix<const float> values) {
  if (values.cols == 0) return;
  const float largest = info(format).facts.largest;
  const uint32_t limit = magnitude(largest);
  std::vector<char> good(values.rows);
  for_pieces(values.rows, values.cols, kCheckOperations, [&](Range rows) {
    for (size_t i = rows.first; i < rows.first + rows.count; ++i)
      good[i] = within(values.cols, values.row(i), limit);
  });
  const size_t bad = size_t(std::find(good.begin(), good.end(), 0) - good.begin());
  if (bad == values.rows) return;
  // x is set to the first value in the row that cannot be stored in the format. If another thread has
  // overwritten the row in the meantime, x may stay 0.
  float x = 0;
  for (size_t i = values.cols; i > 0; --i)
    if (magnitude(values.row(bad)[i - 1]) > limit) x = values.row(bad)[i - 1];
  const std::string found = "row " + std::to_string(bad) + " holds " + text(x);
  if (magnitude(x) >= magnitude(std::numeric_limits<float>::infinity()))
    throw std::invalid_argument(found + ", expected finite values");
  throw std::invalid_argument(found + ", beyond " + text(largest) + ", the largest that " +
                              info(format).name + " can store");
}

namespace {

template <class Block>
void quantize_whole_row(size_t cols, const float* x, uint8_t* out) {
  quantize_blocks(cols / Block::kElements, x, reinterpret_cast<Block*>(out));
}

}  // namespace

void dequantize(BlockFormat format, Matrix<const uint8_t> blocks, Matrix<float> out) {
  if (out.cols == 0) return;
  const auto decode = kernels::table().blocks.decode[static_cast<size_t>(format)];
  for_pieces(out.rows, out.cols, kDecodeOperations, [&](Range rows) {
    decode(rows.count, 0, out.cols, blocks.row(rows.first), blocks.stride, {out.row(rows.first), out.stride});
  });
}

void quantize_row(BlockFormat format, size_t cols, const float* x, uint8_t* out) {
  using Quantizer = void (*)(size_t, const float*, uint8_t*);
#define NPLORA_QUANTIZER(name, Name) quantize_whole_row<Block##Name>,
  constexpr Quantizer kQuantizers[] = {NPLORA_ROW_FORMATS(NPLORA_QUANTIZER)};
#undef NPLORA_QUANTIZER
  kQuantizers[static_cast<size_t>(format)](cols, x, out);
}

void quantize(BlockFormat format, Matrix<const float> values, Matrix<uint8_t> blocks) {
  if (values.cols == 0) return;
  require_storable(format, values);
  for_pieces(values.rows, values.cols, kSearchOperations, [&](Range rows) {
    for (size_t i = rows.first; i < rows.first + rows.count; ++i)
      quantize_row(format, values.cols, values.row(i), blocks.row(i));
  });
}

// ---- NF4 ----

void quantize_nf4(Matrix<const float> values, uint8_t* codes, float* absmax) {
  require_storable(BlockFormat::kNf4, values);
  constexpr size_t kElements = BlockNf4::kElements;
  const size_t n = values.rows * values.cols;
  for_pieces(ceil_div(n, kElements), kElements, kNf4Operations, [&](Range blocks) {
    for (size_t i = blocks.first; i < blocks.first + blocks.count; ++i) {
      const Range block = nth_block(n, kElements, i);
      absmax[i] = quantize_nf4_block(block.count, values.data + block.first, codes + block.first / 2);
    }
  });
}

float quantize_absmax(size_t n, const float* absmax, uint8_t* codes, float (&book)[kNf4Book], float* scales) {
  dynamic_book(book);
  double sum = 0;
  for (size_t i = 0; i < n; ++i) sum += absmax[i];
  const float mean = n == 0 ? 0 : float(sum / double(n));
  for (size_t i = 0; i < ceil_div(n, kNf4Group); ++i) {
    const Range group = nth_block(n, kNf4Group, i);
    float x[kNf4Group];
    for (size_t j = 0; j < group.count; ++j) x[j] = absmax[group.first + j] - mean;
    scales[i] = quantize_nf4_group(group.count, x, book, codes + group.first);
  }
  return mean;
}

void dequantize_nf4(size_t n, const kernels::Nf4& w, float* out) {
  const auto decode = kernels::table().blocks.decode_nf4;
  for_pieces(ceil_div(n, kElementsPerTask), kElementsPerTask, kDecodeOperations, [&](Range pieces) {
    const Range piece = nth_block(n, kElementsPerTask, pieces.first);
    decode(1, piece.count, w, piece.first, 0, {out + piece.first, 0});
  });
}

}  // namespace nplora
