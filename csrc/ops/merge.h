// Adds scale * A B to W in place, without a temporary matrix of the size of W. W may be in any storage format
// except blocks.
#pragma once

#include <cstdint>
#include <optional>

#include "base/matrix.h"
#include "ops/weight.h"

namespace nplora {

// w is (d_out, d_in), a is (d_out, r), b is (r, d_in).
template <class T>
void merge_lora(Matrix<T> w, Matrix<const T> a, Matrix<const T> b, double scale);

// Adds scale * A B to a matrix W in kBfloat16 or kFloat16, which is passed as bit patterns. Sums are computed
// in float and rounded once. Without `key`, a sum is rounded to nearest even. With `key`, a sum is rounded up
// or down at random, so that the expected value is the exact sum. Element (i, j) of W uses random number i *
// w.cols + j of the sequence for `key`.
void merge_lora(Matrix<uint16_t> w, Storage storage, Matrix<const float> a, Matrix<const float> b,
                double scale, std::optional<uint64_t> key);

}  // namespace nplora
