#include "base/aligned_buffer.h"

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
std::atomic<size_t> allocated{0};

}  // namespace

size_t AlignedBuffer::allocations() {
  return allocated;
}

AlignedBuffer::AlignedBuffer(size_t bytes, Life life) : bytes_(bytes) {
  if (bytes == 0) return;
  if (bytes > SIZE_MAX - 2 * kHugePage) throw std::bad_alloc();
  if (bytes < kLeastMapped)
    data_ = ::operator new(bytes, std::align_val_t{kCacheLine}, std::nothrow);
  else
    data_ = life == Life::kLong ? map_beside(bytes) : map(bytes);
  if (data_ == nullptr) throw std::bad_alloc();
  ++allocated;
}

bool AlignedBuffer::resize(size_t bytes) {
  if (bytes_ < kLeastMapped || bytes < kLeastMapped || bytes > SIZE_MAX - 2 * kHugePage) return false;
  char* const resized = nplora::resize(data_, bytes_, bytes);
  if (resized == nullptr) return false;
  data_ = resized;
  bytes_ = bytes;
  return true;
}

AlignedBuffer::~AlignedBuffer() {
  if (bytes_ >= kLeastMapped)
    unmap(data_, bytes_);
  else
    ::operator delete(data_, std::align_val_t{kCacheLine});
}

AlignedBuffer::AlignedBuffer(AlignedBuffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

AlignedBuffer& AlignedBuffer::operator=(AlignedBuffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

}  // namespace nplora
