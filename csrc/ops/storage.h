// The formats that a frozen weight can be stored in, and the way between them and what is computed with.
#pragma once

#include <cstddef>

#include "base/block_formats.h"

namespace nplora {

// Elements one by one; or, from kQ4_0 on, low-bit blocks in the order of BlockFormat.
enum class Storage {
  kFloat32,
  kFloat64,
  kBfloat16,
  kFloat16,
  kQ4_0,
  kQ4_1,
  kQ5_0,
  kQ5_1,
  kQ8_0,
  kQ4_K,
  kQ5_K,
  kQ6_K,
  kNf4
};

inline bool is_blocks(Storage storage) {
  return storage >= Storage::kQ4_0;
}
inline BlockFormat format_of(Storage blocks) {
  return static_cast<BlockFormat>(static_cast<size_t>(blocks) - static_cast<size_t>(Storage::kQ4_0));
}

// Of storage that is not blocks.
size_t bytes_per_element(Storage storage);

// n elements of storage to T and back, rounded to nearest even. T is float, except for kFloat64: double; or, for the two
// 16-bit formats, uint16_t: the bit patterns themselves.
template <class T>
void widen(Storage storage, size_t n, const void* from, T* to);
template <class T>
void narrow(Storage storage, size_t n, const T* from, void* to);

}  // namespace nplora
