#include "base/mapping.h"

#include <atomic>
#include <cstdint>
#include <mutex>
#include <optional>

#include "base/platform.h"
#include "base/range.h"

namespace nplora {

namespace {

// Weights are placed one after the other in regions of kRegion bytes of address space. Only weights of up to
// kLargestNeighbour bytes share huge pages. A larger weight would gain little: most of it fills huge pages of
// its own, and only the end of the weight would share a huge page.
constexpr size_t kRegion = size_t{32} << 20, kLargestNeighbour = size_t{8} << 20;

size_t whole_pages(size_t bytes) {
  return round_up(bytes, platform::page_size());
}

char* huge_page_of(char* at) {
  return at - reinterpret_cast<uintptr_t>(at) % kHugePage;
}

char* huge_page_after(char* at) {
  return huge_page_of(at + kHugePage - 1);
}

// Places weights in memory one after the other, so that they share huge pages. No thread waits for the lock.
// After a fork, the lock may be held by a thread that does not exist in the child process, so a wait in the
// child would never end.
class Neighbours {
 public:
  // Returns `size` bytes of memory for a weight, usually directly after the previous weight. Returns nullptr
  // if weights cannot share huge pages on this system, if another thread holds the lock, or if there is no
  // memory.
  char* take(size_t size) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) return nullptr;
    if (!shares_) shares_ = platform::can_collapse_pages(kHugePage);
    if (!shares_.value_or(false)) return nullptr;
    if (has_hole_.exchange(false) && next_ != end_) move_to(huge_page_after(next_));
    if (size > static_cast<size_t>(end_ - next_) && !open()) return nullptr;
    char* const at = next_;
    next_ += size;
    char* const taken = huge_page_of(next_);
    if (taken > small_pages_) {
      platform::prefer_huge_pages(small_pages_, static_cast<size_t>(taken - small_pages_));
      if (small_pages_ < at) platform::collapse_pages(small_pages_, kHugePage);
      small_pages_ = taken;
    }
    return at;
  }

  // Reports that the memory at `at` will be unmapped. `unmap` must call `leave` before it unmaps any memory,
  // because other code may map the same addresses afterwards. If the memory overlaps a huge page that weights
  // have not filled yet, `take` places no more weights in this huge page, and does not merge its small
  // pages.
  // A thread that is inside `take` at the same time may not see that the memory was unmapped. If other code
  // has mapped the same addresses, `take` may then move the small pages of the other code into a huge page.
  // In this rare case, the other code uses more memory, but no data is lost.
  void leave(const char* at, size_t size) {
    if (at < end_ && at + size > small_pages_) has_hole_ = true;
  }

 private:
  // Lets the next weight begin at `start`, and gives the unused memory before `start` back to the system.
  void move_to(char* start) {
    if (start != next_) platform::unmap_pages(next_, static_cast<size_t>(start - next_));
    next_ = start;
    small_pages_ = start;
  }

  bool open() {
    move_to(end_);
    next_ = nullptr;
    end_ = nullptr;
    char* const region = platform::map_pages(kRegion, kHugePage);
    if (region == nullptr) return false;
    platform::keep_small_pages(region, kRegion);  // no huge page before weights fill it
    next_ = region;
    small_pages_ = region;
    end_ = region + kRegion;
    return true;
  }

  std::mutex mutex_;
  std::optional<bool> shares_;
  char* next_ = nullptr;
  std::atomic<char*> end_ = nullptr;  // the end of the region
  // The start of the first huge-page-sized range that weights do not fill yet. From this address to the end
  // of the region, all pages are small (of normal size) or unused.
  std::atomic<char*> small_pages_ = nullptr;
  std::atomic<bool> has_hole_ = false;
};

constinit Neighbours neighbours;

}  // namespace

char* map(size_t bytes) {
  const size_t size = whole_pages(bytes);
  if (size < kHugePage) return platform::map_pages(size, 1);
  char* const start = platform::map_pages(size, kHugePage);
  if (start != nullptr) platform::prefer_huge_pages(start, size);
  return start;
}

char* map_beside(size_t bytes) {
  const size_t size = whole_pages(bytes);
  if (size <= kLargestNeighbour && size % kHugePage != 0)
    if (char* const at = neighbours.take(size)) return at;
  return map(bytes);
}

char* remap(void* at, size_t old_bytes, size_t new_bytes) {
  const size_t old_size = whole_pages(old_bytes), new_size = whole_pages(new_bytes);
  const bool huge = new_size >= kHugePage;
  if (huge != (old_size >= kHugePage)) return nullptr;
  return platform::remap_pages(static_cast<char*>(at), old_size, new_size, huge ? kHugePage : 1);
}

void unmap(void* at, size_t bytes) {
  const size_t size = whole_pages(bytes);
  neighbours.leave(static_cast<const char*>(at), size);
  platform::unmap_pages(at, size);
}

}  // namespace nplora
