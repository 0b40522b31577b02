// Owned, aligned, uninitialised storage.
#pragma once

#include <cstddef>

#include "base/cache_line.h"

namespace nplora {

enum class Life { kShort, kLong };

// Aligned to cache lines. Buffers of 2 MiB or more use huge pages if the system grants them; long-lived ones
// do from 64 KiB on.
class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  explicit AlignedBuffer(size_t bytes, Life life = Life::kShort);  // throws std::bad_alloc
  ~AlignedBuffer();
  AlignedBuffer(AlignedBuffer&& other) noexcept;
  AlignedBuffer& operator=(AlignedBuffer&& other) noexcept;
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;

  // How many buffers this process has allocated.
  static size_t allocations();

  size_t size() const { return bytes_; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace nplora
