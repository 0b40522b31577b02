#include "base/aligned_buffer.h"

#include <sys/mman.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

#include "base/huge_page_arena.h"

namespace nplora {

namespace {

// From here on a mapping of its own, which goes back to the system as a whole: batches of many sizes leave holes in malloc's
// heap, of which it returns nothing.
constexpr size_t kLeastMapped = size_t{64} << 10;
std::atomic<size_t> allocated{0};

// Never destroyed: weights may end with the process.
HugePageArena& arena() {
  static auto& arena = *new HugePageArena;
  return arena;
}

}  // namespace

size_t AlignedBuffer::allocations() {
  return allocated;
}

AlignedBuffer::AlignedBuffer(size_t bytes, Life life) : bytes_(bytes) {
  if (bytes == 0) return;
  if (bytes > SIZE_MAX - 2 * kHugePage) throw std::bad_alloc();
  if (bytes < kLeastMapped) {
    data_ = std::aligned_alloc(kCacheLine, (bytes + kCacheLine - 1) / kCacheLine * kCacheLine);
  } else if (life == Life::kLong) {
    data_ = arena().allocate(bytes);
    in_arena_ = true;
  } else if (bytes < kHugePage) {
    data_ = map_pages(bytes);
  } else {
    data_ = map_at_huge_page(bytes);
    if (data_ != nullptr) advise_huge(as<char>(), whole_pages(bytes));
  }
  if (data_ == nullptr) throw std::bad_alloc();
  ++allocated;
}

AlignedBuffer::~AlignedBuffer() {
  if (in_arena_)
    arena().free(data_, bytes_);
  else if (bytes_ >= kLeastMapped)
    munmap(data_, whole_pages(bytes_));
  else
    std::free(data_);
}

AlignedBuffer::AlignedBuffer(AlignedBuffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)),
      in_arena_(std::exchange(other.in_arena_, false)) {}

AlignedBuffer& AlignedBuffer::operator=(AlignedBuffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(in_arena_, other.in_arena_);
  return *this;
}

}  // namespace nplora
