// Owned, aligned, uninitialised storage.
#pragma once

#include <cstddef>

namespace nplora {

inline constexpr size_t kCacheLine = 64;

// Cache-line aligned; from 2 MiB on aligned to, and offered to the system as, huge pages.
class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  explicit AlignedBuffer(size_t bytes);  // throws std::bad_alloc
  ~AlignedBuffer();
  AlignedBuffer(AlignedBuffer&& other) noexcept;
  AlignedBuffer& operator=(AlignedBuffer&& other) noexcept;
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;

  size_t size() const { return bytes_; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

// What a thread needs a buffer for. Buffers of different uses are live at the same time.
enum class Scratch {
  kLanesIn,
  kLanesLow,
  kLanesOut,
  kWeight,
  kLowRank,
  kDropped,
  kDroppedLanes,
  kPairing,
  kCount
};

// n elements of this thread's scratch memory for one use. It is kept for the next call and grows only: no
// allocation after the first call of a shape. The contents are undefined.
void* scratch_bytes(Scratch use, size_t bytes);

template <class T>
T* scratch(Scratch use, size_t n) {
  return static_cast<T*>(scratch_bytes(use, n * sizeof(T)));
}

}  // namespace nplora
