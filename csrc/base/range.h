// Cuts n items into blocks of one size, or into a given number of pieces.
#pragma once

#include <algorithm>
#include <cstddef>

namespace nplora {

constexpr size_t ceil_div(size_t a, size_t b) {
  return a / b + (a % b != 0);
}

constexpr size_t round_down(size_t a, size_t b) {
  return a / b * b;
}

constexpr size_t round_up(size_t a, size_t b) {
  return ceil_div(a, b) * b;
}

struct Range {
  size_t first, count;
};

// Returns the range of block i if n items are cut into blocks of `size` items. The last block may be shorter.
constexpr Range nth_block(size_t n, size_t size, size_t i) {
  return {i * size, std::min(size, n - i * size)};
}

// Returns the range of piece i if n items are cut into `pieces` pieces of about equal size. Each piece begins
// at a multiple of `unit`. `pieces` is at least 1 and at most ceil(n / unit). If the pieces differ in size,
// the last piece is one of the shorter pieces.
constexpr Range nth_piece(size_t n, size_t unit, size_t pieces, size_t i) {
  const size_t units = ceil_div(n, unit), first = ceil_div(units * i, pieces) * unit;
  return {first, std::min(n, ceil_div(units * (i + 1), pieces) * unit) - first};
}

}  // namespace nplora
