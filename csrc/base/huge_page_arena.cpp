#include "base/huge_page_arena.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>

namespace nplora {

namespace {

// What one mapping holds. What is larger than half of it has a mapping of its own.
constexpr size_t kRegion = size_t{32} << 20;

char* huge_page_before(char* at) {
  return at - reinterpret_cast<uintptr_t>(at) % kHugePage;
}

// Moves what is in a huge page's place there into one. Linux 6.1 and later do so at once, others in their own time.
void collapse([[maybe_unused]] char* huge_page) {
#ifdef __linux__
  constexpr int kCollapse = 25;  // MADV_COLLAPSE, of which older headers do not know
  madvise(huge_page, kHugePage, kCollapse);
#endif
}

}  // namespace

size_t whole_pages(size_t bytes) {
  static const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return (bytes + page - 1) / page * page;
}

char* map_pages(size_t bytes) {
  void* const start =
      mmap(nullptr, whole_pages(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return start == MAP_FAILED ? nullptr : static_cast<char*>(start);
}

char* map_at_huge_page(size_t bytes) {
  const size_t wanted = whole_pages(bytes);
  char* const first = map_pages(wanted + kHugePage);
  if (first == nullptr) return nullptr;
  const size_t before = (kHugePage - reinterpret_cast<uintptr_t>(first) % kHugePage) % kHugePage;
  if (before > 0) munmap(first, before);
  munmap(first + before + wanted, kHugePage - before);
  return first + before;
}

void advise_huge([[maybe_unused]] char* at, [[maybe_unused]] size_t bytes) {
#ifdef MADV_HUGEPAGE
  madvise(at, bytes, MADV_HUGEPAGE);
#endif
}

void* HugePageArena::allocate(size_t bytes) {
  const size_t size = whole_pages(bytes);
  const std::lock_guard lock(mutex_);
  if (size > kRegion / 2) {
    char* const at = open(size);
    if (at != nullptr) advise_huge(at, size);
    return at;
  }
  if (size > static_cast<size_t>(end_ - next_)) {
    char* const start = open(kRegion);
    if (start == nullptr) return nullptr;
    next_ = small_pages_ = start;
    end_ = start + kRegion;
  } else {
    ++region_of(next_)->second.live;
  }
  char* const at = next_;
  next_ += size;
  char* const taken = huge_page_before(next_);  // before it nothing is free
  if (taken > small_pages_) {
    advise_huge(small_pages_, static_cast<size_t>(taken - small_pages_));
    if (small_pages_ < at) collapse(small_pages_);
    small_pages_ = taken;
  }
  return at;
}

// A region with one allocation, or nullptr.
char* HugePageArena::open(size_t bytes) {
  char* const start = map_at_huge_page(bytes);
  if (start != nullptr) regions_[start] = {start + bytes, 1};
  return start;
}

// Its pages go back to the system, and with the last one the mapping. The place in it is not taken again.
void HugePageArena::free(void* at, size_t bytes) noexcept {
  const std::lock_guard lock(mutex_);
  const auto region = region_of(at);
  if (--region->second.live > 0) {
    madvise(at, whole_pages(bytes), MADV_DONTNEED);
    return;
  }
  if (region->second.end == end_) next_ = end_ = nullptr;
  munmap(region->first, static_cast<size_t>(region->second.end - region->first));
  regions_.erase(region);
}

}  // namespace nplora
