// Owned, aligned, uninitialised storage.
#pragma once

#include <cstddef>

#include "base/cache_line.h"

namespace nplora {

enum class Life { kShort, kLong };

// A buffer that starts at a cache line. A buffer of 2 MiB or more uses huge pages if the system grants them.
// A long-lived buffer (Life::kLong) can already use huge pages if it has 64 KiB or more.
class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  explicit AlignedBuffer(size_t bytes, Life life = Life::kShort);  // throws std::bad_alloc
  ~AlignedBuffer();
  AlignedBuffer(AlignedBuffer&& other) noexcept;
  AlignedBuffer& operator=(AlignedBuffer&& other) noexcept;
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;

  // The number of buffers that this process has allocated so far.
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
