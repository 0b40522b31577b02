#include "base/aligned_buffer.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>
#include <utility>

#include "base/mapping.h"
#include "base/range.h"

namespace nplora {

namespace {

// A buffer of at least this size gets its own memory mapping, so that all its memory returns to the system
// when the buffer is freed. If malloc provided the buffers, most of the freed memory would stay in the
// process: batches of different sizes leave holes in the heap, and malloc rarely returns holes to the system.
constexpr size_t kLeastMapped = size_t{64} << 10;
constexpr size_t kMostBytes = SIZE_MAX - 2 * kHugePage;
std::atomic<size_t> allocated{0};

}  // namespace

size_t AlignedBuffer::allocations() {
  return allocated;
}

AlignedBuffer::AlignedBuffer(size_t bytes, Life life) : bytes_(bytes), life_(life) {
  if (bytes == 0) return;
  if (bytes > kMostBytes) throw std::bad_alloc();
  if (bytes < kLeastMapped)
    data_ = ::operator new(bytes, std::align_val_t{kCacheLine}, std::nothrow);
  else
    data_ = life == Life::kLong ? map_beside(bytes) : map(bytes);
  if (data_ == nullptr) throw std::bad_alloc();
  ++allocated;
}

bool AlignedBuffer::resize(size_t bytes) {
  if (life_ == Life::kLong || std::min(bytes_, bytes) < kLeastMapped || bytes > kMostBytes) return false;
  char* const start = remap(data_, bytes_, bytes);
  if (start == nullptr) return false;
  data_ = start;
  bytes_ = bytes;
  ++allocated;
  return true;
}

AlignedBuffer::~AlignedBuffer() {
  if (bytes_ >= kLeastMapped)
    unmap(data_, bytes_);
  else
    ::operator delete(data_, std::align_val_t{kCacheLine});
}

AlignedBuffer::AlignedBuffer(AlignedBuffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)),
      life_(other.life_) {}

AlignedBuffer& AlignedBuffer::operator=(AlignedBuffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(life_, other.life_);
  return *this;
}

}  // namespace nplora
