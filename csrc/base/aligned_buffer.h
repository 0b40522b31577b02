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

  // The number of buffers that this process has allocated so far.
  static size_t allocations();

  // Changes the size, which leaves the contents undefined. Only for a short-lived buffer (Life::kShort).
  // Returns false if the system cannot do this faster than it would make a new buffer; the buffer is then
  // unchanged.
  bool resize(size_t bytes);

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
