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

// The same on bit patterns of kBfloat16 or kFloat16: summed in float, rounded once: to nearest even, or with a key stochastically,
// element (i, j) by the chance of number i * w.cols + j, so that its mean is the sum.
void merge_lora(Matrix<uint16_t> w, Storage storage, Matrix<const float> a, Matrix<const float> b,
                double scale, std::optional<uint64_t> key);

}  // namespace nplora
