// The storage formats of a frozen weight, and conversions between them and the types of the arithmetic.
#pragma once

#include <cstddef>

#include "kernels/formats.h"

namespace nplora {

// The storage formats: first the formats of single elements, then the low-bit blocks in the order of
// BlockFormat.
#define NPLORA_STORAGE(name, Name) k##Name,
enum class Storage { kFloat32, kFloat64, kBfloat16, kFloat16, NPLORA_ROW_FORMATS(NPLORA_STORAGE) kNf4 };
#undef NPLORA_STORAGE

inline bool is_blocks(Storage storage) {
  return storage > Storage::kFloat16;
}
inline BlockFormat format_of(Storage blocks) {
  return static_cast<BlockFormat>(static_cast<size_t>(blocks) - static_cast<size_t>(Storage::kFloat16) - 1);
}

// The size of one element in bytes, for storage formats that are not blocks.
size_t bytes_per_element(Storage storage);

// `widen` converts n elements from storage to T. `narrow` converts n elements from T to the storage format,
// and rounds to nearest, ties to even. T is float, or double for kFloat64. For the two 16-bit formats, T may
// also be uint16_t. In this case, bit patterns are copied without conversion.
template <class T>
void widen(Storage storage, size_t n, const void* from, T* to);
template <class T>
void narrow(Storage storage, size_t n, const T* from, void* to);

}  // namespace nplora
