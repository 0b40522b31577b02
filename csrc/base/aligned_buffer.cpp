#include "base/aligned_buffer.h"

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

namespace nplora {

namespace {

constexpr size_t kHugePage = size_t{2} << 20;
// From here on a mapping of its own, which goes back to the system as a whole: batches of many sizes leave holes in malloc's
// heap, of which it returns nothing.
constexpr size_t kLeastMapped = size_t{64} << 10;
std::atomic<size_t> allocated{0};

size_t whole_pages(size_t bytes) {
  static const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return (bytes + page - 1) / page * page;
}

void* map(size_t bytes) {
  void* const start =
      mmap(nullptr, whole_pages(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return start == MAP_FAILED ? nullptr : start;
}

// The same at the start of a huge page.
void* map_huge(size_t bytes) {
  const size_t wanted = whole_pages(bytes), mapped = wanted + kHugePage;
  void* const start = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (start == MAP_FAILED) return nullptr;
  auto* const first = static_cast<char*>(start);
  const size_t before = (kHugePage - reinterpret_cast<uintptr_t>(first) % kHugePage) % kHugePage;
  const size_t behind = kHugePage - before;
  if (before > 0) munmap(first, before);
  munmap(first + before + wanted, behind);
#ifdef MADV_HUGEPAGE
  madvise(first + before, wanted, MADV_HUGEPAGE);  // advice: a refusal costs speed, nothing else
#endif
  return first + before;
}

}  // namespace

size_t AlignedBuffer::allocations() {
  return allocated;
}

AlignedBuffer::AlignedBuffer(size_t bytes) : bytes_(bytes) {
  if (bytes == 0) return;
  if (bytes > SIZE_MAX - 2 * kHugePage) throw std::bad_alloc();
  if (bytes >= kHugePage)
    data_ = map_huge(bytes);
  else if (bytes >= kLeastMapped)
    data_ = map(bytes);
  else
    data_ = std::aligned_alloc(kCacheLine, (bytes + kCacheLine - 1) / kCacheLine * kCacheLine);
  if (data_ == nullptr) throw std::bad_alloc();
  ++allocated;
}

AlignedBuffer::~AlignedBuffer() {
  if (bytes_ >= kLeastMapped)
    munmap(data_, whole_pages(bytes_));
  else
    std::free(data_);
}

AlignedBuffer::AlignedBuffer(AlignedBuffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

AlignedBuffer& AlignedBuffer::operator=(AlignedBuffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

}  // namespace nplora
