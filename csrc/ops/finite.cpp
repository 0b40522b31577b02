#include "ops/finite.h"

#include <atomic>
#include <cstdint>
#include <stdexcept>

#include "base/parallel.h"
#include "base/range.h"

namespace nplora {

namespace {

constexpr size_t kTaskBytes = size_t{256} << 10;

// In NaN and infinity all exponent bits are ones. The loop has no early exit, so that the compiler can
// vectorise it.
template <class Bits>
bool any_nonfinite(const Bits* bits, size_t n, Bits exponent) {
  Bits found = 0;
  for (size_t i = 0; i < n; ++i) found |= Bits((bits[i] & exponent) == exponent);
  return found != 0;
}

template <class Bits>
size_t first(const void* elements, size_t n, Bits exponent) {
  constexpr size_t kTask = kTaskBytes / sizeof(Bits);
  const auto* const bits = static_cast<const Bits*>(elements);
  std::atomic<size_t> least = n;
  const size_t tasks = ceil_div(n, kTask);
  parallel_for(tasks, useful_threads(double(n)), Interruptible::kYes, [&](size_t task) {
    const Range range = nth_block(n, kTask, task);
    if (!any_nonfinite(bits + range.first, range.count, exponent)) return;
    size_t at = range.first;
    while ((bits[at] & exponent) != exponent) ++at;
    size_t known = least.load();
    while (at < known && !least.compare_exchange_weak(known, at)) {
    }
  });
  return least;
}

}  // namespace

size_t first_nonfinite(Storage storage, size_t n, const void* elements) {
  switch (storage) {
    case Storage::kFloat32:
      return first<uint32_t>(elements, n, 0x7F800000);
    case Storage::kFloat64:
      return first<uint64_t>(elements, n, 0x7FF0000000000000);
    case Storage::kBfloat16:
      return first<uint16_t>(elements, n, 0x7F80);
    case Storage::kFloat16:
      return first<uint16_t>(elements, n, 0x7C00);
    default:
      throw std::invalid_argument("first_nonfinite: expected storage of single elements, got blocks");
  }
}

}  // namespace nplora
