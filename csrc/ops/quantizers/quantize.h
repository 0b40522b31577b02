// The quantisers of the block formats. ops/blocks.cpp distributes the blocks to threads. Values must be
// finite and within the format's range.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/formats.h"

namespace nplora {

// Quantises x (blocks * Block::kElements) to out (blocks).
template <class Block>
void quantize_blocks(size_t blocks, const float* x, Block* out);

// Quantises n values, at most BlockNf4::kElements. Stores their codes in `codes`, ceil(n / 2) bytes with two
// codes each. Returns absmax, the largest magnitude of the values.
float quantize_nf4_block(size_t n, const float* x, uint8_t* codes);

// Fills `book` with the levels to which absmax is quantised (double quantisation): the dynamic 8-bit code
// book, in ascending order.
void dynamic_book(float (&book)[kNf4Book]);

// Quantises n values, at most kNf4Group, to the levels of `book`. Stores one code for each value in `codes`.
// Returns the scale of the codes.
float quantize_nf4_group(size_t n, const float* x, const float (&book)[kNf4Book], uint8_t* codes);

}  // namespace nplora
