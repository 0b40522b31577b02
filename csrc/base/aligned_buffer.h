// A class that allocates, owns and frees a block of aligned, uninitialised memory.
#pragma once

#include <cstddef>

#include "base/cache_line.h"

namespace nplora {

enum class Life { kShort, kLong };

// A buffer whose address is a multiple of the cache line size. A buffer uses huge pages if the system grants
// them and the buffer is large enough: at least 2 MiB, or at least 64 KiB if the buffer is long-lived
// (Life::kLong).
class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  explicit AlignedBuffer(size_t bytes, Life life = Life::kShort);  // throws std::bad_alloc
  ~AlignedBuffer();
  AlignedBuffer(AlignedBuffer&& other) noexcept;
  AlignedBuffer& operator=(AlignedBuffer&& other) noexcept;
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;

  // How many times this process has allocated or resized a buffer so far.
  static size_t allocations();

  // Changes the size of a short-lived buffer. The contents are then undefined. If the buffer is long-lived,
  // if the old or the new size is below 64 KiB, or if the system cannot keep the buffer's pages, `resize`
  // returns false and changes nothing.
  bool resize(size_t bytes);

  size_t size() const { return bytes_; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
  Life life_ = Life::kShort;
};

}  // namespace nplora
