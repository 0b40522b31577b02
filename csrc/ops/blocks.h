// Conversions between low-bit blocks and float, for whole matrices.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/matrix.h"
#include "kernels/kernel_table.h"
#include "ops/block_formats.h"

namespace nplora {

// Decodes a matrix (rows, cols) that is stored in blocks, in any format except NF4. Each row of `blocks`
// holds the blocks of one row of the matrix, one after the other. BlockFormatInfo has the number of values
// and the number of bytes of a block.
void dequantize(BlockFormat format, Matrix<const uint8_t> blocks, Matrix<float> out);

// Quantises values (rows, cols) to blocks, with a squared error close to the smallest possible error. First
// calls require_storable. If that call throws an error, `blocks` is not changed.
void quantize(BlockFormat format, Matrix<const float> values, Matrix<uint8_t> blocks);

// Throws std::invalid_argument if a value is not finite or too large for the format. The message names the
// row.
void require_storable(BlockFormat format, Matrix<const float> values);

// Quantises one row on the calling thread. The format must be able to store the values.
void quantize_row(BlockFormat format, size_t cols, const float* x, uint8_t* out);

// ---- NF4, whose blocks may begin in one row and end in the next ----

// Quantises n = rows * cols values to NF4. `codes` (ceil(n / 2)) holds two codes in each byte. `absmax`
// (ceil(n / 64)) holds the largest magnitude of each block of 64 values. There must be no gaps between the
// rows of `values`. Like `quantize`, this function first calls require_storable.
void quantize_nf4(Matrix<const float> values, uint8_t* codes, float* absmax);

// The second quantisation of NF4: the array absmax (n) is quantised, too. Fills codes (n), scales (ceil(n /
// kNf4Group)) and `book` (kNf4Book), the table of the numbers that the codes stand for before scaling.
// Returns the mean of `absmax`. The quantised value of absmax[i] is mean + scales[i / kNf4Group] *
// book[codes[i]].
float quantize_absmax(size_t n, const float* absmax, uint8_t* codes, float (&book)[kNf4Book], float* scales);

// Decodes the n values of w to out (n).
void dequantize_nf4(size_t n, const kernels::Nf4& w, float* out);

}  // namespace nplora
