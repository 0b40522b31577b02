// Searches for the best scale of a block, in formats with blocks of 32 values. The search starts with the
// scale that ggml would choose. The search also tries other scales near this one. For each scale, the search
// computes codes, and then fits a new scale to these codes by least squares. The scale with the smallest
// squared error is kept, so no block is worse than with ggml's rule.
#pragma once

#include <algorithm>
#include <cmath>

#include "ops/half.h"
#include "ops/quantizers/code_grid.h"
#include "ops/quantizers/quantize.h"

namespace nplora::blocks_of_32 {

inline constexpr size_t kElements = 32;

inline CodeGrid rounded(CodeGrid grid) {
  return {round_to_half(grid.d), round_to_half(grid.m)};
}

// Finds the grid with the smallest squared error for the values x, among the initial grid and all grids that
// are passed to `show`. A grid is rounded to float16 before its error is computed, because blocks store their
// grids in float16.
struct Best {
  const float* x;
  CodeRange codes;
  CodeGrid grid;
  float error = squared_error<kElements>(x, grid, codes);

  void show(CodeGrid other) {
    const CodeGrid stored = rounded(other);
    const float e = squared_error<kElements>(x, stored, codes);
    if (e < error) {  // false if the new scale is infinite, because `e` is then NaN
      error = e;
      grid = stored;
    }
  }
};

// Returns the best grid d * q, where the codes q are the integers from -n to n - 1.
inline CodeGrid best_scale(const float* x, float n) {
  const CodeRange codes{-n, n - 1};
  const auto [low, high] = std::minmax_element(x, x + kElements);
  const float extreme = std::abs(*low) > std::abs(*high) ? *low : *high;
  Best best{x, codes, rounded({extreme / -n})};
  for (int i = 0; i < kTries; ++i)
    for (float side : {-1.0f, 1.0f}) {
      const CodeGrid start{side * extreme / (n + codes_of_try(i))};
      best.show(fitted_scale(moments<kElements>(x, start, codes), start));
    }
  return best.grid;
}

// Returns the best grid d * q + m, where the codes q are the integers from 0 to `last`.
inline CodeGrid best_affine(const float* x, float last) {
  const CodeRange codes{0, last};
  const auto [low, high] = std::minmax_element(x, x + kElements);
  const float range = *high - *low;
  Best best{x, codes, rounded({range / last, *low})};
  for (int i = 0; i < kTries; ++i) {
    const CodeGrid start{range / (last + codes_of_try(i)), *low};
    best.show(fitted(moments<kElements>(x, start, codes), start));
  }
  return best.grid;
}

// Rounds the values x of a block to codes on `grid`, and stores the codes in `out`. A stored code is the code
// minus codes.first, so the smallest stored code is 0. The low four bits of a stored code are in a nibble of
// out.q. In 5-bit formats, bit 4 is in out.high.
template <class Block>
void store_codes(const float* x, CodeGrid grid, CodeRange codes, Block& out) {
  const Encoder code(grid, codes);
  uint8_t q[kElements];
  for (size_t i = 0; i < kElements; ++i) q[i] = static_cast<uint8_t>(code(x[i]) - codes.first);
  for (size_t i = 0; i < kElements / 2; ++i)
    out.q[i] = static_cast<uint8_t>((q[i] & 15) | (q[i + kElements / 2] & 15) << 4);
  if constexpr (requires { out.high; })
    for (size_t byte = 0; byte < 4; ++byte) {
      out.high[byte] = 0;
      for (size_t bit = 0; bit < 8; ++bit)
        out.high[byte] = static_cast<uint8_t>(out.high[byte] | (q[8 * byte + bit] >> 4) << bit);
    }
}

// Quantises to a format without a minimum, whose codes q are the integers from -n to n - 1.
template <class Block>
void quantize_scale(size_t blocks, const float* x, Block* out, float n) {
  for (; blocks > 0; --blocks, x += kElements, ++out) {
    const CodeGrid grid = best_scale(x, n);
    out->d = to_half(grid.d);
    store_codes(x, grid, {-n, n - 1}, *out);
  }
}

// Quantises to a format with a minimum, whose codes q are the integers from 0 to `last`.
template <class Block>
void quantize_affine(size_t blocks, const float* x, Block* out, float last) {
  for (; blocks > 0; --blocks, x += kElements, ++out) {
    const CodeGrid grid = best_affine(x, last);
    out->d = to_half(grid.d);
    out->m = to_half(grid.m);
    store_codes(x, grid, {0, last}, *out);
  }
}

}  // namespace nplora::blocks_of_32
