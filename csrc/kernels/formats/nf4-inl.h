// The format NF4 of bitsandbytes. NF4 is the only format whose blocks run through the flattened tensor
// instead of along its rows.
#pragma once

#include "base/block.h"

namespace nplora {

// An element with code q is absmax * kNf4Levels[q], where `absmax` is the scale of the block. A block is 64
// elements of the flattened tensor, and may begin and end within a row. In a block, the code of element 2 * i
// is the high nibble of byte i, and the code of element 2 * i + 1 is the low nibble of byte i. The scales are
// in a separate array, with one float for each block. The scales may themselves be quantised. A quantised
// scale with the 8-bit code c is book[c] * s + offset, where the array `book` has kNf4Book levels, and each
// group of kNf4Group blocks has one factor s.
struct BlockNf4 {
  static constexpr size_t kElements = 64;
  static constexpr BlockFacts kFacts{.largest = 0x1.FFFFFEp127f};
  uint8_t q[32];
};
static_assert(sizeof(BlockNf4) == 32);
inline constexpr size_t kNf4Group = 256, kNf4Book = 256;

// The levels of NF4 are quantiles of a normal distribution, with an exact zero (Dettmers et al. 2023,
// appendix E).
inline constexpr float kNf4Levels[16] = {-1.0f,
                                         -0.6961928009986877f,
                                         -0.5250730514526367f,
                                         -0.39491748809814453f,
                                         -0.28444138169288635f,
                                         -0.18477343022823334f,
                                         -0.09105003625154495f,
                                         0.0f,
                                         0.07958029955625534f,
                                         0.16093020141124725f,
                                         0.24611230194568634f,
                                         0.33791524171829224f,
                                         0.44070982933044434f,
                                         0.5626170039176941f,
                                         0.7229568362236023f,
                                         1.0f};

}  // namespace nplora

#ifdef NPLORA_ISA
namespace nplora::kernels::NPLORA_ISA {

// A copy of the levels. The copy is in the namespace of the kernel unit, because kernel units share no inline
// code (see vec.h).
struct Nf4Levels {
  float v[16];
};
inline constexpr Nf4Levels kLevels = [] {
  Nf4Levels levels{};
  for (size_t i = 0; i < 16; ++i) levels.v[i] = kNf4Levels[i];
  return levels;
}();

// Returns the scale of block `block`. Like bitsandbytes, this function rounds the product before it adds the
// offset. Without the keyword `volatile`, the compiler could use a fused multiply-add, which does not round
// the product.
inline float absmax_of(const Nf4& w, size_t block) {
  if (w.absmax) return w.absmax[block];
  const volatile float product = w.absmax_book[w.absmax_codes[block]] * w.absmax_scales[block / kNf4Group];
  return product + w.absmax_offset;
}

inline float nf4_value(const uint8_t* codes, size_t i, float absmax) {
  return kLevels.v[i % 2 == 0 ? codes[i / 2] >> 4 : codes[i / 2] & 15] * absmax;
}

// Decodes the elements [i, i + n) of the flattened tensor into `to`. All these elements must be in one block.
inline void decode_nf4_run(const uint8_t* codes, size_t i, size_t n, float absmax, const Levels& levels,
                           DecodedRow to) {
  const Vec<float> d = Vec<float>::broadcast(absmax);
  const auto one = [&] {
    *to = nf4_value(codes, i++, absmax);
    to = to + 1;
    --n;
  };
  if (i % 2 != 0 && n > 0) one();
  for (; n >= kSubBlock; n -= kSubBlock, i += kSubBlock, to = to + kSubBlock) {
    const Bytes q = load_bytes(codes + i / 2);
    const BytePair in_order = interleave(high_nibbles(q), low_nibbles(q));
    put(lookup(levels, in_order.low), d, to);
    put(lookup(levels, in_order.high), d, to + kBytes);
  }
  while (n > 0) one();
}

inline void decode_nf4(size_t rows, size_t cols, Nf4 w, size_t first, size_t row_step,
                       const DecodedRows& to) {
  constexpr size_t kElements = BlockNf4::kElements;
  const Levels levels(kLevels.v);
  for (size_t row = 0; row < rows; ++row) {
    fetch_columns(w.codes + (first + (row + kRowsAhead) * row_step) / 2, cols / 2);
    DecodedRow out{to.data + row * to.stride, to.apart};
    for (size_t c = 0; c < cols;) {
      const size_t i = first + row * row_step + c, n = smaller(cols - c, kElements - i % kElements);
      decode_nf4_run(w.codes, i, n, absmax_of(w, i / kElements), levels, out + c);
      c += n;
    }
  }
}

// The rows of a weight in NF4. Row i begins with element first + i * row_step of the flattened tensor. Each
// row must begin at the start of a block and have a whole number of blocks.
struct Nf4Rows {
  static constexpr size_t kElements = BlockNf4::kElements;
  Nf4 w;
  size_t first, row_step;
  Levels levels;
  size_t ahead = fetch_ahead(row_step / 2);

  template <size_t kRows, class To>
  [[gnu::always_inline]] void add(const size_t (&rows)[kRows], size_t cols, const To& to) const {
    for (size_t i = 0; i < cols; i += kElements)
#pragma GCC unroll 4
      for (size_t r = 0; r < kRows; ++r) {
        const size_t element = first + rows[r] * row_step + i;
        const uint8_t* codes = w.codes + element / 2;
        __builtin_prefetch(codes + ahead, 0, 2);
        const Vec<float> d = Vec<float>::broadcast(absmax_of(w, element / kElements));
#pragma GCC unroll 2
        for (size_t j = 0; j < kElements; j += kSubBlock) {
          const Bytes q = load_bytes(codes + j / 2);
          const BytePair in_order = interleave(high_nibbles(q), low_nibbles(q));
          put(lookup(levels, in_order.low), lookup(levels, in_order.high), d, to(r, i) + j);
        }
      }
  }
};

inline void dot_nf4(size_t m, size_t rows, size_t cols, Nf4 w, size_t first, size_t row_step, const float* x,
                    size_t x_stride, float* part, const Fetch& next) {
  dot_rows(Nf4Rows{w, first, row_step, Levels(kLevels.v)}, m, rows, cols, x, x_stride, part, next);
}

}  // namespace nplora::kernels::NPLORA_ISA
#endif
