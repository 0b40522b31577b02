// W += scale * A B in place, in any storage format, without a temporary of W's size.
#pragma once

#include <cstdint>
#include <optional>

#include "base/matrix.h"
#include "ops/weight.h"

namespace nplora {

// w (d_out, d_in), a (d_out, r), b (r, d_in).
template <class T>
void merge_lora(Matrix<T> w, Matrix<const T> a, Matrix<const T> b, double scale);

// Merges into bit patterns of kBfloat16 or kFloat16. Sums are in float and rounded once, to nearest even.
// With a key the sums are rounded stochastically, so that the expected value is the sum; element (i, j) uses
// random number i * w.cols + j.
void merge_lora(Matrix<uint16_t> w, Storage storage, Matrix<const float> a, Matrix<const float> b,
                double scale, std::optional<uint64_t> key);

}  // namespace nplora
