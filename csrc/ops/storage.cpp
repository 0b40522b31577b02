#include "ops/storage.h"

#include <bit>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "kernels/kernel_table.h"

namespace nplora {

// Some kernels write a pair of bfloat16 numbers as two 16-bit numbers and later read it as one 32-bit number,
// whose low half must be the first number. So nplora needs a little-endian machine.
static_assert(std::endian::native == std::endian::little, "nplora needs a little-endian machine");

size_t bytes_per_element(Storage storage) {
  switch (storage) {
    case Storage::kFloat32:
      return 4;
    case Storage::kFloat64:
      return 8;
    case Storage::kBfloat16:
    case Storage::kFloat16:
      return 2;
    default:
      throw std::logic_error("expected storage of single elements, got blocks");
  }
}

template <class T>
void widen(Storage storage, size_t n, const void* from, T* to) {
  if constexpr (std::is_same_v<T, float>) {
    const kernels::Conversions& convert = kernels::table().convert;
    const auto* bits = static_cast<const uint16_t*>(from);
    if (storage == Storage::kBfloat16) return convert.widen_bfloat16(n, bits, to);
    if (storage == Storage::kFloat16) return convert.widen_float16(n, bits, to);
  }
  if (bytes_per_element(storage) != sizeof(T))
    throw std::logic_error("the elements of this storage have another size than the type to convert");
  if (n > 0) std::memcpy(to, from, n * sizeof(T));
}

template <class T>
void narrow(Storage storage, size_t n, const T* from, void* to) {
  if constexpr (std::is_same_v<T, float>) {
    const kernels::Conversions& convert = kernels::table().convert;
    auto* bits = static_cast<uint16_t*>(to);
    if (storage == Storage::kBfloat16) return convert.narrow_bfloat16(n, from, bits);
    if (storage == Storage::kFloat16) return convert.narrow_float16(n, from, bits);
  }
  if (bytes_per_element(storage) != sizeof(T))
    throw std::logic_error("the elements of this storage have another size than the type to convert");
  if (n > 0) std::memcpy(to, from, n * sizeof(T));
}

#define NPLORA_INSTANTIATE(T)                            \
  template void widen(Storage, size_t, const void*, T*); \
  template void narrow(Storage, size_t, const T*, void*)
NPLORA_INSTANTIATE(float);
NPLORA_INSTANTIATE(double);
NPLORA_INSTANTIATE(uint16_t);
#undef NPLORA_INSTANTIATE

}  // namespace nplora
