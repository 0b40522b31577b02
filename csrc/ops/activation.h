// Elementwise functions that NumPy lacks, and dropout.
#pragma once

#include <cstddef>
#include <cstdint>

#include "ops/storage.h"

namespace nplora {

// out (n) = x Phi(x), where Phi is the normal distribution function. If `tanh` is false, Phi is computed with
// erf. If `tanh` is true, Phi is approximated by the tanh formula of Hendrycks & Gimpel 2016.
template <class T>
void gelu(size_t n, const T* x, bool tanh, T* out);

// The gradient of gelu: out (n) = dy * gelu'(x).
template <class T>
void gelu_backward(size_t n, const T* x, const T* dy, bool tanh, T* out);

// Dropout: out (n) = 0 for each element that is dropped, and x / (1 - probability) for all other elements. A
// random number generator with the seed `key` chooses the elements that are dropped.
template <class T>
void dropout(size_t n, const T* x, double probability, uint64_t key, T* out);

// `storage` names a 16-bit float format. widen_bits converts n numbers of this format to floats, and
// narrow_bits converts n floats to this format. A uint16_t holds the bits of one number.
void widen_bits(size_t n, const uint16_t* from, Storage storage, float* to);
void narrow_bits(size_t n, const float* from, Storage storage, uint16_t* to);

}  // namespace nplora
