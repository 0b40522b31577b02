#include "base/mapping.h"

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <fstream>
#include <mutex>
#include <optional>
#include <string>

#include "base/range.h"

namespace nplora {

namespace {

// Weights are placed one after the other in regions of kRegion bytes of address space. Only weights of up to
// kLargestNeighbour bytes share huge pages. In a larger weight, the small pages at the end are only a small
// part.
constexpr size_t kRegion = size_t{32} << 20, kLargestNeighbour = size_t{8} << 20;

#ifdef __linux__
constexpr int kCollapse = 25;  // MADV_COLLAPSE (Linux 6.1), which older headers lack
#endif

// The page size is read when the library is loaded. If it were a static variable inside whole_pages, the
// child of a fork could wait forever for a thread that was initialising the variable.
const size_t page_size = static_cast<size_t>(sysconf(_SC_PAGESIZE));

size_t whole_pages(size_t bytes) {
  return round_up(bytes, page_size);
}

char* huge_page_of(char* at) {
  return at - reinterpret_cast<uintptr_t>(at) % kHugePage;
}

char* huge_page_after(char* at) {
  return huge_page_of(at + kHugePage - 1);
}

char* map_pages(size_t bytes) {
  void* const start = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return start == MAP_FAILED ? nullptr : static_cast<char*>(start);
}

void advise_huge([[maybe_unused]] char* at, [[maybe_unused]] size_t bytes) {
#ifdef MADV_HUGEPAGE
  madvise(at, bytes, MADV_HUGEPAGE);
#endif
}

// Maps this many bytes of memory. The memory starts at a multiple of the huge page size.
char* map_aligned(size_t bytes) {
  char* const first = map_pages(bytes + kHugePage);
  if (first == nullptr) return nullptr;
  char* const start = huge_page_after(first);
  const auto before = static_cast<size_t>(start - first);
  if (before > 0) munmap(first, before);
  munmap(start + bytes, kHugePage - before);
  return start;
}

#ifdef __linux__

std::string setting(const char* name) {
  std::string line;
  std::getline(std::ifstream(std::string("/sys/kernel/mm/transparent_hugepage/") + name), line);
  return line;
}

// Whether the system can move the content of small pages into a huge page. Returns no value if there is no
// memory for a trial. MADV_COLLAPSE ignores the administrator's settings for huge pages, so these settings
// are read first.
std::optional<bool> can_collapse() {
  std::string enabled = setting("hugepages-2048kB/enabled");
  if (enabled.empty() || enabled.find("[inherit]") != std::string::npos) enabled = setting("enabled");
  if (enabled.empty() || enabled.find("[never]") != std::string::npos) return false;
  if (setting("hpage_pmd_size") != std::to_string(kHugePage)) return false;
  char* const trial = map_aligned(kHugePage);
  if (trial == nullptr) return std::nullopt;
  *trial = 1;
  // The error EINVAL means that the kernel does not know kCollapse. Other errors mean that no huge page is
  // free.
  const bool knows = madvise(trial, kHugePage, kCollapse) == 0 || errno != EINVAL;
  munmap(trial, kHugePage);
  return knows;
}

// Places weights in memory one after the other, so that they share huge pages. No thread waits for the lock,
// because in the child of a fork, the thread that holds the lock may not exist.
class Neighbours {
 public:
  // Returns nullptr if weights cannot share huge pages on this system, if another thread holds the lock, or
  // if there is no memory.
  char* take(size_t size) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) return nullptr;
    if (!shares_) shares_ = can_collapse();
    if (!shares_.value_or(false)) return nullptr;
    if (has_hole_.exchange(false) && next_ != end_) move_to(huge_page_after(next_));
    if (size > static_cast<size_t>(end_ - next_) && !open()) return nullptr;
    char* const at = next_;
    next_ += size;
    char* const taken = huge_page_of(next_);
    if (taken > small_pages_) {
      advise_huge(small_pages_, static_cast<size_t>(taken - small_pages_));
      if (small_pages_ < at) madvise(small_pages_, kHugePage, kCollapse);
      small_pages_ = taken;
    }
    return at;
  }

  // Called before memory is unmapped, because other code may then map the same addresses. If these addresses
  // belong to a huge page that weights have not filled yet, the small pages in this huge page are never
  // collapsed. A `take` that runs on another thread at the same time may miss this call. Other code may then
  // use more memory, but no data is lost.
  void leave(const char* at, size_t size) {
    if (at < end_ && at + size > small_pages_) has_hole_ = true;
  }

 private:
  // Places the next weight at `start`, and returns the unused address space before `start` to the system.
  void move_to(char* start) {
    if (start != next_) munmap(next_, static_cast<size_t>(start - next_));
    next_ = start;
    small_pages_ = start;
  }

  bool open() {
    move_to(end_);
    next_ = nullptr;
    end_ = nullptr;
    char* const region = map_aligned(kRegion);
    if (region == nullptr) return false;
    madvise(region, kRegion, MADV_NOHUGEPAGE);  // pages stay small until weights fill them
    next_ = region;
    small_pages_ = region;
    end_ = region + kRegion;
    return true;
  }

  std::mutex mutex_;
  std::optional<bool> shares_;
  char* next_ = nullptr;
  std::atomic<char*> end_ = nullptr;  // of the region
  // The start of the first huge page that weights do not fill yet. All pages of the region after this address
  // are small or unused.
  std::atomic<char*> small_pages_ = nullptr;
  std::atomic<bool> has_hole_ = false;
};

constinit Neighbours neighbours;

#endif

}  // namespace

char* map(size_t bytes) {
  const size_t size = whole_pages(bytes);
  if (size < kHugePage) return map_pages(size);
  char* const start = map_aligned(size);
  if (start != nullptr) advise_huge(start, size);
  return start;
}

char* map_beside(size_t bytes) {
#ifdef __linux__
  const size_t size = whole_pages(bytes);
  if (size <= kLargestNeighbour && size % kHugePage != 0)
    if (char* const at = neighbours.take(size)) return at;
#endif
  return map(bytes);
}

void unmap(void* at, size_t bytes) {
  const size_t size = whole_pages(bytes);
#ifdef __linux__
  neighbours.leave(static_cast<const char*>(at), size);
#endif
  munmap(at, size);
}

}  // namespace nplora
