// W += scale * A B in place, in any storage format, without a temporary of W's size.
#pragma once

#include <cstdint>

#include "base/matrix.h"
#include "ops/weight.h"

namespace nplora {

// w (d_out, d_in), a (d_out, r), b (r, d_in).
template <class T>
void merge_lora(Matrix<T> w, Matrix<const T> a, Matrix<const T> b, double scale);

// The same on bit patterns of kBfloat16 or kFloat16: summed in float, rounded once to nearest even.
void merge_lora(Matrix<uint16_t> w, Storage storage, Matrix<const float> a, Matrix<const float> b,
                double scale);

}  // namespace nplora
