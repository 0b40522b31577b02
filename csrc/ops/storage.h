// The formats that a frozen weight can be stored in, and the way between them and what is computed with.
#pragma once

#include <cstddef>

namespace nplora {

enum class Storage { kFloat32, kFloat64, kBfloat16, kFloat16 };

size_t bytes_per_element(Storage storage);

// n elements of storage to T and back, rounded to nearest even. T is float, except for kFloat64: double; or, for the two
// 16-bit formats, uint16_t: the bit patterns themselves.
template <class T>
void widen(Storage storage, size_t n, const void* from, T* to);
template <class T>
void narrow(Storage storage, size_t n, const T* from, void* to);

}  // namespace nplora
