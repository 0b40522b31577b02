// The quantisers for a run of blocks. ops/blocks.cpp distributes runs to threads. Values must be finite and
// within the format's range.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/formats.h"

namespace nplora {

// out (blocks) from x (blocks * Block::kElements).
template <class Block>
void quantize_blocks(size_t blocks, const float* x, Block* out);

// codes (ceil(n / 2)) of n <= BlockNf4::kElements values; returns their absmax.
float quantize_nf4_block(size_t n, const float* x, uint8_t* codes);

// The levels to which absmax is quantised (double quantisation): the dynamic 8-bit code book, ascending.
void dynamic_book(float (&book)[kNf4Book]);

// codes (n) of n <= kNf4Group values; returns their scale.
float quantize_nf4_group(size_t n, const float* x, const float (&book)[kNf4Book], uint8_t* codes);

}  // namespace nplora
